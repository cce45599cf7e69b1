"""Measure FP16, INT4 and INT4 + LoRA with the shapes of Llama-2-7B: bytes, memory, tokens/s.

Print the table; ``--output NAME`` writes ``results/NAME.json`` and ``.md``. Each kind of weights
has a separate process. The processes run in turn, in a new random order in each round.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import dataclasses
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.child import Child
from benchmarks.machine import chosen_device, machine
from benchmarks.seed_table.report import NAMES, report, rows
from benchmarks.seed_table.shapes import KINDS, Model, free_bytes, layers_that_fit

RESULTS = Path(__file__).parents[1] / "results"
SIZES = [field.name for field in dataclasses.fields(Model)]
FEWEST_ROUNDS = 2


def options_of(arguments):
    """Return the checked options, with defaults filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seed_table", description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json and .md")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    parser.add_argument("--dtype", choices=NAMES, help="default: float16, or bfloat16 on a CPU")
    parser.add_argument("--layers", type=int, help="layers to hold (default: all that fit)")
    parser.add_argument("--rounds", type=int, default=15, help="(15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    for field in dataclasses.fields(Model):
        if field.name != "layers":
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=int, default=field.default, help="%(default)s")
    options = parser.parse_args(arguments)
    options.device = chosen_device(parser, options.device)
    options.dtype = options.dtype or ("float16" if options.device == "cuda" else "bfloat16")
    whole = Model().layers
    if options.layers is not None and not 1 <= options.layers <= whole:
        parser.error(f"--layers: 1 to {whole}, got {options.layers}")
    if options.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds: {FEWEST_ROUNDS} or more, got {options.rounds}")
    columns = (options.hidden, options.intermediate)
    if any(size < 8 or size % options.group_size or size % 8 for size in columns):
        parser.error(f"--hidden and --intermediate: multiples of 8 and of {options.group_size}")
    return options


def measured(options, model, layers, folder):
    """Return the measurements by kind of weights."""
    children, measurements = {}, {}
    sizes = dataclasses.asdict(model)
    how = {name: getattr(options, name) for name in ("dtype", "device", "threads")}
    try:
        for kind in KINDS:
            log = Path(folder) / f"{kind.replace(' ', '')}.log"
            children[kind] = child = Child("benchmarks.seed_table.holder", log)
            made = child.ask("make", kind=kind, sizes=sizes, layers=layers, **how)
            measurements[kind] = {**made, "layers": [], "head": []}
            print(f"{kind}: made", file=sys.stderr, flush=True)
        turns = [(kind, what) for kind in KINDS for what in ("layers", "head")]
        rng = random.Random(0)
        for number in range(options.rounds + 1):
            rng.shuffle(turns)
            for kind, what in turns:
                seconds = children[kind].ask("run", what=what)
                if number:  # the first round warms up
                    measurements[kind][what].append(seconds)
        for kind in KINDS:
            measurements[kind] |= children[kind].ask("memory")
    finally:
        for child in children.values():
            child.close()
    return measurements


def main(arguments=None):
    """Measure, print, and write."""
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    sizes = {name: getattr(options, name) for name in SIZES if name != "layers"}
    model = Model(**sizes)
    layers = options.layers or layers_that_fit(model, free_bytes(options.device))
    host = machine(options.device)
    measurements = measured(options, model, layers, tempfile.mkdtemp(prefix="seed-table-logs-"))
    table = report(host, measurements, model, layers, options.dtype)
    print(table)
    if options.output:
        record = {
            "machine": host,
            "options": vars(options),
            "layers": layers,
            "measured": measurements,
            "rows": rows(measurements, model, layers),
        }
        (RESULTS / f"{options.output}.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / f"{options.output}.md").write_text(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
