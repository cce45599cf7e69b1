"""One INT4 layer with adapters against its peers: ``python -m benchmarks.layer``.

Prints a table and the bars; ``--output NAME`` writes ``results/NAME.json``, ``.md`` and ``.png``.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.contenders import PEERS, Layer
from int4_lora.compiled.timing import copy_bandwidth, measure

RESULTS = Path(__file__).parent / "results"
SHAPES = ((4096, 4096), (11008, 4096))
TOKENS = (1, 4, 16, 64, 256)


def machine():
    """Return what the figures hold for."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {
        "date": date.today().isoformat(),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "int4-lora": version("int4-lora"),
        "copy_bytes_per_second": copy_bandwidth(),
    }


def cell(rows, columns, tokens, dtype, group_size, options):
    """Measure one shape with one number of tokens."""
    layer = Layer(rows, columns, tokens, dtype, group_size)
    if options.in_a_graph:
        chains = layer.compiled_contenders()
        called = {name: chain for name, (chain, _) in chains.items()}
        layers = {name: count for name, (_, count) in chains.items()}
    else:
        called = layer.contenders()
        layers = dict.fromkeys(called, 1)
    times = measure(called, rounds=options.rounds, budget=options.budget)
    return {
        "rows": rows,
        "columns": columns,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "group_size": group_size,
        "packed_bytes": layer.weight.nbytes,
        "lora_share": layer.lora_share(),
        "in_a_graph": options.in_a_graph,
        "milliseconds": {name: 1e3 * one.median / layers[name] for name, one in times.items()},
        "spread": {name: one.spread for name, one in times.items()},
        "rounds": len(times["ours"].seconds),
    }


def bars(found):
    """Return the ratios that the bars are about."""
    times = found["milliseconds"]
    best = min(times[name] for name in times if name == PEERS[1]) if PEERS[1] in times else None
    return {
        "ours / best INT4 peer": times["ours"] / best if best else None,
        "ours / dense": times["ours"] / times["dense"],
        "LoRA adds": times["ours + LoRA"] / times["ours"] - 1,
        "LoRA adds us": 1e3 * (times["ours + LoRA"] - times["ours"]),
        "LoRA may add": found["lora_share"] + 0.1,
    }


def table(cells):
    """Return the results as a table in Markdown."""
    names = list(dict.fromkeys(name for one in cells for name in one["milliseconds"]))
    head = ["shape", "x", "M", *names, *bars(cells[0])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in cells:
        times = [
            f"{one['milliseconds'][name]:.3f} ±{100 * one['spread'][name]:.0f} %"
            if name in one["milliseconds"] else "-"
            for name in names
        ]  # fmt: skip
        ratios = ["-" if ratio is None else f"{ratio:.2f}" for ratio in bars(one).values()]
        shape = f"{one['rows']} x {one['columns']}"
        cells_of_row = [shape, one["dtype"], str(one["tokens"]), *times, *ratios]
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return "\n".join(lines)


def plot(cells, file):
    """Draw time over tokens, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((one["rows"], one["columns"], one["dtype"]) for one in cells))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(6 * len(shapes), 4.5), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        own = [one for one in cells if (one["rows"], one["columns"], one["dtype"]) == shape]
        for name in dict.fromkeys(name for one in own for name in one["milliseconds"]):
            points = [
                (one["tokens"], one["milliseconds"][name])
                for one in own if name in one["milliseconds"]
            ]  # fmt: skip
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=str(shape))
        axis.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def main():
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json, .md and .png")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument(
        "--in-a-graph",
        action="store_true",
        help="compile as many layers as leave the cache behind into one graph, as engines do",
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--budget", type=float, default=15, help="seconds a cell")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cells = []
    with torch.inference_mode():
        for dtype in options.dtypes:
            for shape in options.shapes:
                for tokens in options.tokens:
                    size = options.group_size
                    found = cell(*SHAPES[shape], tokens, getattr(torch, dtype), size, options)
                    print(json.dumps({**found, "bars": bars(found)}), flush=True)
                    cells.append(found)
    print(table(cells))
    if options.output:
        record = {"machine": machine(), "cells": cells}
        (RESULTS / f"{options.output}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / f"{options.output}.md").write_text(table(cells) + "\n")
        plot(cells, RESULTS / f"{options.output}.png")


if __name__ == "__main__":
    main()
