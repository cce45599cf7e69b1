"""Judge the leading formulations by the conformance suite's quick cases, on the device of the run.

The backend is ``CompiledBackend``, with a formulation chosen wherever it takes the operands;
elsewhere the default computes. How many calls each formulation computed is counted, so that a
formulation that took no case does not pass for one that conforms.
"""

import contextlib
import time
from collections import Counter
from unittest import mock

from benchmarks.tables import markdown
from int4_lora.compiled import layouts, linear, prepare
from int4_lora.compiled.graphs import entry
from int4_lora.compiled.selection.choice import default
from int4_lora.integration.conformance import scorecard
from int4_lora.integration.conformance.compiled_backend import CompiledBackend
from int4_lora.reference.conformance import Backend, run_case, select, settled

__all__ = ["conformance"]

SEED = 0


class OfFormulation(CompiledBackend):
    """The compiled layers, on the layout that a formulation reads.

    Args:
        formulation: the formulation.
    """

    def __init__(self, formulation):
        self._formulation = formulation

    def prepare(self, weight):
        """Return the weight in the first layout that the formulation reads, else in the default."""
        for layout in layouts(weight):
            prepared = prepare(weight, layout=layout)
            if isinstance(prepared, self._formulation.layout):
                return prepared
        return prepare(weight)


@contextlib.contextmanager
def chosen(formulation):
    """Choose a formulation wherever it takes the operands; give the calls by formulation.

    Args:
        formulation: the formulation.
    """
    computed = Counter()

    def choose(weight, dtype, tokens, slices=()):
        takes = formulation.takes(weight, dtype, tokens, slices)
        return formulation if takes else default(weight, dtype, tokens, slices)

    def choose_and_count(*operands):
        computed[choose(*operands).name] += 1
        return choose(*operands)

    with (
        mock.patch.object(entry, "choose", choose_and_count),  # for the computation
        mock.patch.object(linear, "choose", choose),  # for the roundings that it declares
    ):
        yield computed


def conformance(run):
    """Yield the outcomes so far, as a record and as a table."""
    reports, leading = [], run.leading()
    for place, formulation in enumerate(leading):
        left = run.deadline - time.perf_counter()
        until = time.perf_counter() + left / (len(leading) - place)
        reports.append(_report(run, formulation, until))
        yield {"formulations": reports}, _table(reports)


def _report(run, formulation, until):
    """Return the report on a formulation, of the first case and those begun before ``until``."""
    device, backend = run.options.device, OfFormulation(formulation)
    watched, outcomes = Backend(backend, formulation.name), []
    cases = select(run.options.cases, quick=True)
    with chosen(formulation) as computed:
        for case in cases:
            if outcomes and time.perf_counter() > until:
                break
            outcomes.append(run_case(watched, case, seed=SEED, device=device))
    outcomes = settled(outcomes)
    manifest = backend.manifest
    report = scorecard.as_json(formulation.name, manifest, outcomes, device, SEED)
    return {**report, "not_run": len(cases) - len(outcomes), "computed": dict(computed)}


def _table(reports):
    lines = []
    for report in reports:
        counts = report["counts"]
        own = report["computed"].get(report["backend"], 0)
        wrong = [case["case"] for case in report["cases"] if case["status"] == "failed"]
        numbers = [
            *counts.values(),
            report["not_run"],
            f"{own} of {sum(report['computed'].values())}",
        ]
        lines.append([report["backend"], *map(str, numbers), ", ".join(wrong) or "-"])
    head = [
        "formulation",
        "passed",
        "failed",
        "not claimed",
        "not run",
        "calls it computed",
        "wrong",
    ]
    return markdown(head, lines)
