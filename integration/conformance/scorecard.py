"""What came of a run, as a table for people and as JSON for programs.

Source: ``docs/commands/conform.md``; the scorecard is that of TorchCTS.
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
from int4_lora.reference.conformance import FUNCTIONS, Manifest, Outcome

__all__ = ["as_json", "conforms", "diagnoses", "print_scorecard"]

SHOWN = 10


def conforms(outcomes: Sequence[Outcome]) -> bool | None:
    """Return whether no case failed, or None if none was judged."""
    counts = Counter(outcome.status for outcome in outcomes)
    return None if not counts["passed"] + counts["failed"] else not counts["failed"]


def diagnoses(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Return how many failures each diagnosis explains; two faults are joined by "+"."""
    found = Counter("+".join(one.diagnosis) for one in outcomes if one.status == "failed")
    return dict(found.most_common())


def as_json(
    name: str, manifest: Manifest, outcomes: Sequence[Outcome], device: str, seed: int
) -> dict[str, Any]:
    """Return a run as plain values.

    Args:
        name: the backend's.
        manifest: its claims.
        outcomes: settled.
        device: where it ran.
        seed: of the inputs.
    """
    counts = Counter(outcome.status for outcome in outcomes)
    return {
        "backend": name,
        "conforms": conforms(outcomes),
        "versions": versions(),
        "device": device,
        "seed": seed,
        "manifest": {key: _plain(value) for key, value in vars(manifest).items()},
        "counts": {status: counts[status] for status in ("passed", "failed", "skipped")},
        "diagnosis": diagnoses(outcomes),
        "cases": [_case(outcome) for outcome in outcomes],
    }


def versions() -> dict[str, str]:
    """Return what a verdict depends on."""
    return {
        "int4_lora": int4_lora.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def print_scorecard(
    console: Console, name: str, outcomes: Sequence[Outcome], device: str, seed: int
) -> None:
    """Print the table, the failures, the reasons of the skips, and the smallest failure."""
    known = ", ".join(f"{key} {value}" for key, value in versions().items())
    console.print(Text(f"{name} on {device}, seed {seed} ({known})"))
    table = Table()
    for title in ("function", "passed", "failed", "skipped"):
        table.add_column(title, justify="left" if title == "function" else "right")
    for function in FUNCTIONS:
        own = Counter(one.status for one in outcomes if one.case.startswith(f"{function}/"))
        if own:
            counts = (str(own[status]) for status in ("passed", "failed", "skipped"))
            table.add_row(function, *counts)
    console.print(table)
    _print_failures(console, [one for one in outcomes if one.status == "failed"])
    reasons = Counter(one.message for one in outcomes if one.status == "skipped")
    for reason, count in reasons.most_common():
        console.print(Text(f"skipped {count}: {reason}"))
    seconds = sum(outcome.seconds for outcome in outcomes)
    verdict = {True: "conforms", False: "does not conform", None: "nothing was judged"}
    judged = sum(outcome.status != "skipped" for outcome in outcomes)
    said = f"{name}: {verdict[conforms(outcomes)]} ({judged} cases judged, {seconds:.0f} s)"
    console.print(Text(said, style="bold"))


def _print_failures(console: Console, failures: Sequence[Outcome]) -> None:
    if not failures:
        return
    table = Table(title="failures")
    for title in ("case", "diagnosis", "where", "why"):
        table.add_column(title, overflow="fold", no_wrap=title == "case")
    for one in failures[:SHOWN]:
        diagnosis = " + ".join(one.diagnosis)
        table.add_row(one.case, diagnosis, Text(one.where), Text(f"{one.rule}: {one.message}"))
    console.print(table)
    if len(failures) > SHOWN:
        console.print(f"and {len(failures) - SHOWN} more; --json has them all")
    for diagnosis, count in diagnoses(failures).items():
        example = next(one for one in failures if "+".join(one.diagnosis) == diagnosis)
        variants = " + ".join(filter(None, example.variants))
        console.print(Text(f"{count} of {len(failures)}: {diagnosis} {variants}".rstrip()))
    shown = [one for one in failures if one.snippet]
    if shown:
        least = min(shown, key=lambda one: one.elements or 2**62)
        console.print(Text(f"\nThe smallest failure again ({least.case}):\n"))
        console.print(Text(least.snippet), soft_wrap=True)
        console.print()


def _case(outcome: Outcome) -> dict[str, Any]:
    found = dataclasses.asdict(outcome)
    found["diagnosis"] = list(outcome.diagnosis)
    found["variants"] = list(outcome.variants)
    found["explanations"] = [list(one.names) for one in outcome.explanations]
    found["seconds"] = round(outcome.seconds, 3)
    return found


def _plain(value: object) -> object:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return [_plain(one) for one in value] if isinstance(value, tuple) else value
