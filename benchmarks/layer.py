"""Measure one INT4 layer with adapters beside its peers: ``python -m benchmarks.layer``.

Print each row as JSON, then the tables; ``--output NAME`` writes ``results/NAME.json``, ``.md``
and ``.png``. On CUDA, everything but the eager reference is replayed from CUDA graphs.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.cell import cell
from benchmarks.machine import chosen_device, machine
from benchmarks.report import bars, plot, report

RESULTS = Path(__file__).parent / "results"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # out_features, in_features
DTYPES = ("bfloat16", "float16", "float32")
SHAPES_OF = {"cpu": (0, 1), "cuda": (0, 1, 2)}
TOKENS_OF = {
    "cpu": (1, 4, 16, 64, 256),
    "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048),
}


def options_of(arguments):
    """Return the checked options, with defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json, .md and .png")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of x")
    parser.add_argument("--shapes", type=int, nargs="+", help=f"indices into {SHAPES}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of x")
    parser.add_argument("--group-size", type=int, default=128, help="columns that share a scale")
    parser.add_argument(
        "--in-a-graph",
        action="store_true",
        help="compile enough layers to exceed the cache into one graph, as engines do",
    )
    parser.add_argument("--rounds", type=int, default=60, help="the most rounds")
    parser.add_argument("--budget", type=float, default=15, help="seconds for each row")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    options = parser.parse_args(arguments)
    if options.shapes and not set(options.shapes) <= set(range(len(SHAPES))):
        parser.error(f"--shapes: indices of 0 to {len(SHAPES) - 1}, got {options.shapes}")
    if options.group_size < 1 or options.rounds < 2 or min(options.tokens or [1]) < 1:
        parser.error("--group-size and --tokens must be 1 or more, --rounds 2 or more")
    options.device = chosen_device(parser, options.device)
    if options.device == "cuda" and options.in_a_graph:
        parser.error("--in-a-graph is for a CPU: on CUDA everything is in CUDA graphs")
    options.tokens = options.tokens or TOKENS_OF[options.device]
    options.shapes = SHAPES_OF[options.device] if options.shapes is None else options.shapes
    return options


def main(arguments=None):
    """Measure, print, and write; return 1 if our layer failed in any row."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    host = machine(options.device)
    cells = []
    with torch.inference_mode():
        for dtype in options.dtypes:
            for shape in options.shapes:
                for tokens in options.tokens:
                    row = cell(
                        *SHAPES[shape],
                        tokens,
                        getattr(torch, dtype),
                        options,
                        host["copy_bytes_per_second"],
                    )
                    row["bars"] = bars(row)
                    print(json.dumps(row), flush=True)
                    cells.append(row)
    print(report(cells))
    if options.output:
        record = {"machine": host, "cells": cells}
        (RESULTS / f"{options.output}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / f"{options.output}.md").write_text(report(cells) + "\n")
        plot(cells, RESULTS / f"{options.output}.png")
    failed = [name for row in cells for name in row["refused"] if name.startswith("ours")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
