"""Measure the speed of unpacking and of copying: ``python -m benchmarks.unpack``.

The script writes a checkpoint of random INT4 weights. In each round, ``int4-lora unpack`` unpacks
it in a separate process, whose peak memory is read, and then the result is copied file by file. For
both, the files to read are first dropped from the page cache, and the written files are flushed to
the disk. ``--output NAME`` writes ``results/NAME.json`` and ``.md``.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.machine import machine

RESULTS = Path(__file__).parent / "results"
SIZE, GROUP, MODULES = 4096, 128, 8  # rows, group size, modules per shard
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
           "group_size": GROUP}  # fmt: skip
MOST_BYTES, LEAST_SPEED = 1.5e9, 0.6
PEAK = """
import sys
from int4_lora.integration.cli.app import app
try:
    app(sys.argv[1:])
finally:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:")).split()[1]
    print("peak", int(peak) * 1024, file=sys.stderr)
"""


def make(folder, nbytes):
    """Write a checkpoint with at least ``nbytes`` of random INT4; return its bytes of INT4."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map, made, layer = {}, 0, 0
    while made < nbytes:
        name, tensors = f"model-{layer:05}.safetensors", {}
        for number in range(MODULES):
            module = f"model.layers.{layer}.part{number}_proj"
            words = torch.randint(-(2**31), 2**31, (SIZE, SIZE // 8), generator=generator)
            tensors[f"{module}.weight_packed"] = words.to(torch.int32)
            scale = torch.rand(SIZE, SIZE // GROUP, generator=generator) / 100
            tensors[f"{module}.weight_scale"] = scale.bfloat16()
            tensors[f"{module}.weight_shape"] = torch.tensor([SIZE, SIZE])
            made += SIZE * SIZE // 2
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        layer += 1
    group = {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                    "config_groups": {"group_0": group}, "ignore": ["lm_head"]}  # fmt: skip
    config = {"model_type": "llama", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def unpack(source, target, jobs):
    """Unpack in another process; return the seconds and the peak memory in bytes."""
    started = time.perf_counter()
    command = [sys.executable, "-c", PEAK, "unpack", str(source), str(target), "--jobs", str(jobs)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    seconds = time.perf_counter() - started
    peak = next(line for line in log.splitlines() if line.startswith("peak "))
    return seconds, int(peak.split()[1])


def copy(source, target):
    """Copy a folder's files and flush them to the disk; return the seconds."""
    started = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        with file.open("rb") as read, (target / file.name).open("wb") as written:
            shutil.copyfileobj(read, written, 16 * 2**20)
            written.flush()
            os.fsync(written.fileno())
    return time.perf_counter() - started


def forget(folder):
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(folder, gigabytes, rounds, jobs):
    """Return the bytes, the seconds of each round, and the peak memory."""
    made = make(folder / "source", gigabytes * 1e9)
    figures = {"int4_bytes": made, "unpack": [], "copy": [], "peak": []}
    for _ in range(rounds):
        forget(folder / "source")
        seconds, peak = unpack(folder / "source", folder / "dense", jobs)
        figures["unpack"].append(seconds)
        figures["peak"].append(peak)
        files = list((folder / "dense").iterdir())
        figures["dense_bytes"] = sum(file.stat().st_size for file in files)
        forget(folder / "dense")
        figures["copy"].append(copy(folder / "dense", folder / "copied"))
        shutil.rmtree(folder / "copied")
        shutil.rmtree(folder / "dense")
    return figures


def table(figures):
    """Return the figures in Markdown."""
    unpacked, copied = statistics.median(figures["unpack"]), statistics.median(figures["copy"])
    dense = figures["dense_bytes"] / 1e9
    lines = [
        f"{figures['int4_bytes'] / 1e9:.1f} GB of INT4, {dense:.1f} GB dense; medians of "
        f"{len(figures['copy'])} rounds in turns",
        "",
        "| nothing cached before | seconds | GB/s of the dense bytes | peak memory, GB |",
        "|---|---|---|---|",
        f"| copy, synced | {copied:.1f} | {dense / copied:.2f} | - |",
        f"| unpack, synced, the start of Python included | {unpacked:.1f} | "
        f"{dense / unpacked:.2f} | {max(figures['peak']) / 1e9:.2f} |",
        "",
        f"speed over copying: {copied / unpacked:.2f} (bar {LEAST_SPEED}); peak memory: "
        f"{max(figures['peak']) / 1e9:.2f} GB (bar {MOST_BYTES / 1e9})",
    ]
    return "\n".join(lines)


def main(arguments=None):
    """Measure and print; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the INT4 weights (4)")
    parser.add_argument("--rounds", type=int, default=3, help="how often both are measured (3)")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="of unpack")
    parser.add_argument("--folder", type=Path, help="with room for 9 times as much")
    parser.add_argument("--output", help="write results/OUTPUT.json and .md")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measured(Path(folder), options.gigabytes, options.rounds, options.jobs)
    print(table(figures))
    if options.output:
        file = RESULTS / f"{options.output}.json"
        file.write_text(json.dumps({"machine": machine("cpu"), **figures}, indent=1) + "\n")
        file.with_suffix(".md").write_text(table(figures) + "\n")
    speed = statistics.median(figures["copy"]) / statistics.median(figures["unpack"])
    return 0 if speed >= LEAST_SPEED and max(figures["peak"]) <= MOST_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
