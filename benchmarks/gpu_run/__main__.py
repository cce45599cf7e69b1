"""Measure and check all that needs a GPU within a budget: ``python -m benchmarks.gpu_run``.

Each part's results are written to the folder as it goes on, so that a run cut short leaves them:
``layers.json``, ``layers.png``, ``sweep.json``, ``conformance.json``, ``served.json``,
``profile.json``, ``profile-trace.json`` and ``report.md``. When a part's share of the budget is
over, it begins nothing more. A part that fails is named, and the next one runs. The exit code is 1
if a part failed or a result was wrong.

Source: ``benchmarks/results/README.md``, "How a GPU is measured".
"""

import argparse
import functools
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import layer
from benchmarks.command import say, write
from benchmarks.gpu_run.conformance import conformance
from benchmarks.gpu_run.layers import layers
from benchmarks.gpu_run.profiled import profiled
from benchmarks.gpu_run.run import Run, seconds
from benchmarks.gpu_run.served import served
from benchmarks.gpu_run.sweep import sweep
from benchmarks.judgement import reason
from benchmarks.machine import in_a_line, machine
from benchmarks.report import plot
from int4_lora.reference.conformance import select

PARTS = {  # in the order in which they run, with the share of the budget of each
    "layers": (layers, 0.5),
    "sweep": (sweep, 0.2),
    "conformance": (conformance, 0.2),
    "served": (served, 0.05),
    "profile": (profiled, 0.05),
}
TOKENS = (1, 16, 64, 256, 4)  # the ranges of the formulations first
ROUNDS, ROW_SECONDS = 25, 2


def options_of(arguments):
    """Return the options of the layer benchmark, and those of the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="DIR", help="the folder of the results")
    parser.add_argument(
        "--budget", type=seconds, default=300, help="time in all, as 300 or 5m (5m)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--shapes", nargs="+", help=f"OUTxIN or an index; {layer.SHAPES}")
    parser.add_argument("--tokens", nargs="+", default=list(map(str, TOKENS)), help=f"{TOKENS}")
    parser.add_argument("--dtypes", nargs="+", choices=layer.DTYPES, default=["bfloat16"])
    parser.add_argument("--threads", default=str(os.cpu_count()), help="of torch")
    parser.add_argument("--cases", help="conformance cases, separated by commas (the quick ones)")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="compile the kernels for an H200 on a machine without a GPU, and run nothing",
    )
    given = parser.parse_args(arguments)
    if given.output is None and not given.rehearse:
        parser.error("--output DIR is needed")
    try:
        select(given.cases, quick=True)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    shapes = given.shapes or map(str, range(len(layer.SHAPES)))
    limits = ["--rounds", str(ROUNDS), "--budget", str(ROW_SECONDS), "--threads", given.threads]
    sizes = ["--shapes", *shapes, "--tokens", *given.tokens, "--dtypes", *given.dtypes]
    options = layer.options_of([*limits, *sizes])
    options.cases = given.cases
    return options, given


def main(arguments=None):
    """Run the parts, and write their results; return 1 if a part failed or a result was wrong."""
    started = time.perf_counter()
    options, given = options_of(arguments)
    if given.rehearse:
        from benchmarks.gpu_run.rehearsal import rehearse

        return rehearse(options)
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    run = Run(options, machine(options.device), given.output)
    tables, share, wrong = {}, 0.0, []
    for name in given.parts:
        part, of_budget = PARTS[name]
        share += of_budget
        whole = sum(PARTS[other][1] for other in given.parts)
        run.deadline = started + given.budget * share / whole
        say(f"{time.perf_counter() - started:.0f} s: {name}")
        wrong += _results(run, name, part, tables)
    say(f"{time.perf_counter() - started:.0f} s: done")
    print(_report(run, tables))
    for fault in wrong:
        say(f"wrong: {fault}")
    return 1 if wrong else 0


def _results(run, name, part, tables):
    """Run a part, write what it yields, and return its faults."""
    record = {}
    try:
        for record, tables[name] in part(run):
            _keep(run, name, record, tables)
        if name == "layers" and run.cells:
            _keep(run, name, record, tables, functools.partial(plot, run.cells))
    except Exception as error:  # the other parts still run
        say(traceback.format_exc())
        record = {**record, "failed": reason(error)}
        tables[name] = f"{tables.get(name, '')}\n\nThe part failed: {reason(error)}".strip()
        _keep(run, name, record, tables)
    return [f"{name}: {fault}" for fault in faults(record)]


def _keep(run, name, record, tables, drawn=None):
    """Write the record of a part, and the tables of all parts so far."""
    options = {key: value for key, value in vars(run.options).items() if key != "output"}
    whole = {"machine": run.host, "options": options, **record}
    write(run.folder, name, whole, plot=drawn)
    (run.folder / "report.md").write_text(_report(run, tables) + "\n", encoding="utf-8")


def _report(run, tables):
    sections = [f"## {name}\n\n{table}" for name, table in tables.items()]
    return "\n\n".join([f"{in_a_line(run.host)}.", *sections])


def faults(record):
    """Return what is wrong with a part's results, each in a line.

    Args:
        record: what the part yielded last.
    """
    found = [record["failed"]] if "failed" in record else []
    for cell in record.get("cells", ()):
        sizes = f"{cell['rows']} x {cell['columns']}, {cell['tokens']} tokens"
        refused = cell["refused"].items()
        found += [f"{sizes}: {name}: {why}" for name, why in refused if name.startswith("ours")]
    for report in record.get("formulations", ()):
        failed = [case["case"] for case in report["cases"] if case["status"] == "failed"]
        found += [f"{report['backend']}: {case}" for case in failed]
    if "vllm" in record:
        rows = [row for row in record["rows"] if row["wrong"]]
        found += [f"{row['tokens']} tokens, ids: {row['ids']}: {row['wrong']}" for row in rows]
    return found


if __name__ == "__main__":
    sys.exit(main())
