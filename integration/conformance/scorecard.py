"""The outcomes of a run, as a scorecard for people and as JSON for programs.

Source: ``docs/commands/conform.md``; the scorecard follows TorchCTS.
"""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import int4_lora
from int4_lora.reference.conformance import FUNCTIONS, REMEDIES, Manifest, Outcome

__all__ = ["as_json", "conforms", "diagnoses", "plain", "print_scorecard", "versions"]

SHOWN = 10  # failures


def conforms(outcomes: Sequence[Outcome]) -> bool | None:
    """Return whether no case failed, or None if none was judged."""
    counts = Counter(outcome.status for outcome in outcomes)
    return None if not counts["passed"] + counts["failed"] else not counts["failed"]


def diagnoses(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Return the number of failures by diagnosis; two faults are joined by "+"."""
    failures = (outcome for outcome in outcomes if outcome.status == "failed")
    counts = Counter("+".join(failure.diagnosis) for failure in failures)
    return dict(counts.most_common())


def as_json(
    name: str, manifest: Manifest, outcomes: Sequence[Outcome], device: str, seed: int
) -> dict[str, Any]:
    """Return a run as plain values.

    Args:
        name: the backend's name.
        manifest: its claims.
        outcomes: settled.
        device: the device of the operands.
        seed: of the inputs.
    """
    counts = Counter(outcome.status for outcome in outcomes)
    return {
        "backend": name,
        "conforms": conforms(outcomes),
        "versions": versions(),
        "device": device,
        "seed": seed,
        "manifest": {key: plain(value) for key, value in vars(manifest).items()},
        "counts": {status: counts[status] for status in ("passed", "failed", "skipped")},
        "diagnosis": diagnoses(outcomes),
        "cases": [_case(outcome) for outcome in outcomes],
    }


def versions() -> dict[str, str]:
    """Return the versions that a verdict depends on."""
    return {
        "int4_lora": int4_lora.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_scorecard(
    console: Console, name: str, outcomes: Sequence[Outcome], device: str, seed: int
) -> None:
    """Print the table, the failures, the reasons for skips, and the verdict."""
    known = ", ".join(f"{key} {value}" for key, value in versions().items())
    console.print(Text(f"{name} on {device}, seed {seed} ({known})"))
    table = Table()
    for title in ("function", "passed", "failed", "skipped"):
        table.add_column(title, justify="left" if title == "function" else "right")
    for function in FUNCTIONS:
        counts = Counter(
            outcome.status for outcome in outcomes if outcome.case.startswith(f"{function}/")
        )
        if counts:
            cells = (str(counts[status]) for status in ("passed", "failed", "skipped"))
            table.add_row(function, *cells)
    console.print(table)
    _print_failures(console, [outcome for outcome in outcomes if outcome.status == "failed"])
    reasons = Counter(outcome.message for outcome in outcomes if outcome.status == "skipped")
    for reason, count in reasons.most_common():
        console.print(Text(f"skipped {count}: {reason}"))
    seconds = sum(outcome.seconds for outcome in outcomes)
    verdict = {True: "conforms", False: "does not conform", None: "nothing was judged"}
    judged = sum(outcome.status != "skipped" for outcome in outcomes)
    summary = f"{name}: {verdict[conforms(outcomes)]} ({judged} cases judged, {seconds:.0f} s)"
    console.print(Text(summary, style="bold"))


def _print_failures(console: Console, failures: Sequence[Outcome]) -> None:
    if not failures:
        return
    table = Table(title="failures")
    for title in ("case", "diagnosis", "where", "why"):
        table.add_column(title, overflow="fold", no_wrap=title == "case")
    for failure in failures[:SHOWN]:
        why = Text(f"{failure.rule}: {failure.message}")
        table.add_row(failure.case, " + ".join(failure.diagnosis), Text(failure.where), why)
    console.print(table)
    if len(failures) > SHOWN:
        console.print(f"and {len(failures) - SHOWN} more; --json has them all")
    for diagnosis, count in diagnoses(failures).items():
        example = next(each for each in failures if "+".join(each.diagnosis) == diagnosis)
        variants = " + ".join(filter(None, example.variants))
        console.print(Text(f"{count} of {len(failures)}: {diagnosis} {variants}".rstrip()))
        for name in example.diagnosis:
            console.print(Text(f"  fix: {REMEDIES[name].fix}"))
    reproducible = [failure for failure in failures if failure.snippet]
    if reproducible:
        smallest = min(reproducible, key=lambda failure: failure.elements or 2**62)
        console.print(Text(f"\nTo reproduce the smallest failure ({smallest.case}):\n"))
        console.print(Text(smallest.snippet), soft_wrap=True)
        console.print()


def _case(outcome: Outcome) -> dict[str, Any]:
    case = dataclasses.asdict(dataclasses.replace(outcome, evidence=None))
    del case["evidence"]
    case["diagnosis"] = list(outcome.diagnosis)
    case["variants"] = list(outcome.variants)
    case["explanations"] = [list(explanation.names) for explanation in outcome.explanations]
    case["seconds"] = round(outcome.seconds, 3)
    return case


def plain(value: object) -> object:
    """Return a claim of a manifest as JSON has it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return [plain(item) for item in value] if isinstance(value, tuple) else value
