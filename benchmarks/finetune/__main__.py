"""Measure training and generation on an INT4 base, beside dense bf16 and transformers' own path.

Print the tables; ``--output NAME`` writes ``results/NAME.json``, ``.md`` and, if matplotlib is
installed, ``.png``. The exit code is 1 if a bar is missed.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.command import cache_folder, finish, say
from benchmarks.finetune.accounting import stored
from benchmarks.finetune.bars import SIZES, judged, not_judged
from benchmarks.finetune.files import prepare, read_once
from benchmarks.finetune.report import plot, report
from benchmarks.finetune.rounds import Rounds
from benchmarks.finetune.starts import starts
from benchmarks.finetune.workloads import (
    FORWARD,
    FORWARD_1,
    GENERATES,
    STEPS,
    TRAINING,
    Sizes,
)

MEMORY, FORWARDS, GENERATED, STEPPED = PARTS = ("memory", "forwards", "generate", "steps")
QUICK = {"hidden": 256, "layers": 2, "timed_layers": 2, "rounds": 2, "starts": 1}
FULL = {"hidden": 2048, "layers": 16, "timed_layers": 4, "rounds": 5, "starts": 3}
QUICK_SIZES = Sizes(rows=2, length=64, prompt=4, new=8)
PACKAGES = ("transformers", "peft", "compressed-tensors")


def options_of(arguments):
    """Return the checked options, with defaults filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json, .md and .png")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="memory: of training; forwards: the first ones; the speed of generate, of steps (all)",
    )
    parser.add_argument("--hidden", type=int, help="width, a multiple of 256 (2048)")
    parser.add_argument("--layers", type=int, help="decoder layers for memory and generate (16)")
    parser.add_argument(
        "--timed-layers", type=int, help="decoder layers for the times of steps and forwards (4)"
    )
    parser.add_argument("--rounds", type=int, help="how often each speed is measured (5)")
    parser.add_argument("--starts", type=int, help="fresh processes for the first forwards (3)")
    parser.add_argument("--quick", action="store_true", help=f"use the defaults {QUICK}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(all processors)")
    parser.add_argument("--seed", type=int, default=0, help="of the random order (0)")
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), help="folder of the models (%(default)s)"
    )
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.hidden < 256 or options.hidden % 256:
        parser.error(f"--hidden: a multiple of 256, got {options.hidden}")
    for name in ("layers", "timed_layers", "rounds", "starts", "threads"):
        if getattr(options, name) < 1:
            shown = name.replace("_", "-")
            parser.error(f"--{shown}: 1 or more, got {getattr(options, name)}")
    options.sizes = QUICK_SIZES if options.quick else SIZES
    return options


def measured(options, whole, timed):
    """Return the results of the parts, and the threads of the processes.

    Args:
        options: the command's options.
        whole: the files for memory and ``generate``.
        timed: the files for the times of steps and forwards.
    """
    folder = Path(tempfile.mkdtemp(prefix="finetune-"))
    results = {"starts": [], "rounds": [], "idle_shares": {}}
    threads = set()
    forwards = (FORWARD,) if options.quick else (FORWARD, FORWARD_1)
    for part, files, workloads, rounds in (
        (MEMORY, whole, (TRAINING,), 1),
        (FORWARDS, timed, forwards, options.starts),
    ):
        if part in options.parts:
            started = starts(
                files,
                options.sizes,
                folder,
                workloads=workloads,
                rounds=rounds,
                threads=options.threads,
                seed=options.seed,
                say=say,
            )
            threads |= {run["imports"]["threads"] for run in started}
            results["starts"] += started
    groups = {}  # the workloads of each model, whose processes load once
    for part, files, workloads in ((GENERATED, whole, GENERATES), (STEPPED, timed, STEPS)):
        if part in options.parts:
            groups[files] = (*groups.get(files, ()), *workloads)
    for files, workloads in groups.items():
        turns = Rounds(workloads, folder, options.threads, say)
        try:
            threads |= set(turns.load(files).values())
            results["rounds"] += turns.run(options.sizes, options.rounds, options.seed)
            idle = turns.idle_shares().items()
        finally:
            turns.close()
        results["idle_shares"] |= {f"{name} ({workloads[0]})": share for name, share in idle}
    (count,) = threads  # all have --threads
    return results, count


def record_of(options):
    """Measure, and return the complete result as JSON types."""
    import torch

    from benchmarks.machine import machine, versions

    torch.set_num_threads(options.threads)  # of the copies that ``machine`` times
    whole, timed = (
        prepare(options.cache.resolve(), options.hidden, layers)
        for layers in (options.layers, options.timed_layers)
    )
    options.stored = stored(whole.int4)
    for folder in (whole.int4, whole.dense, timed.int4, timed.dense):
        read_once(folder)
    results, threads = measured(options, whole, timed)
    return {
        "machine": {**machine("cpu"), "threads": threads},
        "versions": versions(*PACKAGES),
        "options": {
            **vars(options),
            "cache": None,
            "sizes": dataclasses.asdict(options.sizes),
            "stored": dataclasses.asdict(options.stored),
        },
        **results,
        "bars": judged(results["starts"], results["rounds"], options.stored),
        "not_judged": not_judged(options),
    }


def main(arguments=None):
    """Measure, print and write; return 1 if a bar is missed."""
    options = options_of(arguments)
    record = record_of(options)
    tables = report(record, options)
    return finish(options.output, record, tables, functools.partial(plot, record))


if __name__ == "__main__":
    sys.exit(main())
