"""Measure one layer with adapters beside its peers: ``python -m benchmarks.layer``.

``--format`` says how the weight is stored; the peers take INT4 only, the dense layer is always
measured.

Print each row as JSON, then the tables; ``--output NAME`` writes ``results/NAME.json``, ``.md``
and ``.png``. On CUDA, everything but the eager reference is replayed from CUDA graphs.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.cell import cell
from benchmarks.command import RESULTS, write
from benchmarks.contention import STOPS, BusyProcesses
from benchmarks.machine import chosen_device, machine
from benchmarks.report import bars, plot, report
from benchmarks.weights import FORMATS

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672))  # out_features, in_features
DTYPES = ("bfloat16", "float16", "float32")
SHAPES_OF = {"cpu": SHAPES[:2], "cuda": SHAPES[:3]}
TOKENS_OF = {
    "cpu": (1, 4, 16, 64, 256),
    "cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048),
}


def shape_of(text):
    """Return the shape that an argument names: an index into ``SHAPES``, or OUTxIN.

    Example:
        >>> shape_of("1"), shape_of("512x256")
        ((11008, 4096), (512, 256))
    """
    if text.isdecimal() and int(text) < len(SHAPES):
        return SHAPES[int(text)]
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if sizes is None:
        raise argparse.ArgumentTypeError(f"0 to {len(SHAPES) - 1}, or OUTxIN, got {text!r}")
    return int(sizes[1]), int(sizes[2])


def options_of(arguments):
    """Return the checked options, with defaults filled in; a group size of None is a whole row."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json, .md and .png")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="rows of x")
    parser.add_argument(
        "--shapes",
        type=shape_of,
        nargs="+",
        metavar="SHAPE",
        help=f"out_features x in_features, as OUTxIN or an index into {SHAPES}",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of x")
    parser.add_argument(
        "--format", choices=FORMATS, default="int4", help="how the weight is stored (%(default)s)"
    )
    parser.add_argument(
        "--group-size",
        type=int,
        help="columns that share a scale (int4: 128, int8: a whole row; fixed for fp4)",
    )
    parser.add_argument(
        "--in-a-graph",
        action="store_true",
        help="compile enough layers to exceed the cache into one graph, as engines do",
    )
    parser.add_argument(
        "--contended",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="PROCESSES",
        help="measure again beside busy processes (1), in turns with the quiet rounds",
    )
    parser.add_argument("--rounds", type=int, default=60, help="the most rounds")
    parser.add_argument("--budget", type=float, default=15, help="seconds for each row")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    options = parser.parse_args(arguments)
    least = min(options.tokens or [1]), 1 if options.group_size is None else options.group_size
    if options.rounds < 2 or min(least) < 1:
        parser.error("--group-size and --tokens must be 1 or more, --rounds 2 or more")
    options.device = chosen_device(parser, options.device)
    if options.device == "cuda" and options.in_a_graph:
        parser.error("--in-a-graph is for a CPU: on CUDA everything is in CUDA graphs")
    if options.contended < 0 or (options.contended and (options.device != "cpu" or not STOPS)):
        parser.error("--contended needs a CPU, a system that can stop processes, and 1 or more")
    options.tokens = options.tokens or TOKENS_OF[options.device]
    options.shapes = options.shapes or SHAPES_OF[options.device]
    fixed = FORMATS[options.format].is_float
    if fixed and options.group_size not in (None, FORMATS[options.format].group_size):
        parser.error(f"--group-size is {FORMATS[options.format].group_size} for {options.format}")
    options.group_size = options.group_size or FORMATS[options.format].group_size
    for rows, columns in options.shapes:
        if columns % (options.group_size or columns):
            parser.error(f"--shapes {rows}x{columns}: --group-size must divide in_features")
    return options


def rows(options, host):
    """Yield the row of each dtype, shape and number of tokens, measured one after the other.

    Args:
        options: returned by ``options_of``.
        host: returned by ``machine``.
    """
    with contextlib.ExitStack() as stack:
        busy = None
        if options.contended:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="busy-")))
            busy = stack.enter_context(contextlib.closing(BusyProcesses(options.contended, folder)))
        measured = functools.partial(
            cell,
            options=options,
            copy_bytes_per_second=host["copy_bytes_per_second"],
            busy=busy,
        )
        for dtype in options.dtypes:
            for shape in options.shapes:
                for tokens in options.tokens:
                    row = measured(*shape, tokens, getattr(torch, dtype))
                    yield {**row, "bars": bars(row), "busy_processes": options.contended}


def main(arguments=None):
    """Measure, print, and write; return 1 if our layer failed in any row."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    host = machine(options.device)
    cells = []
    for row in rows(options, host):
        print(json.dumps(row), flush=True)
        cells.append(row)
    print(report(cells))
    if options.output:
        record = {"machine": host, "cells": cells}
        write(RESULTS, options.output, record, report(cells), functools.partial(plot, cells))
    failed = [name for row in cells for name in row["refused"] if name.startswith("ours")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
