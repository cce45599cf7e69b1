"""A failed case as a report shows it: the map, the numbers, and where the wrong elements are.

Source: ``docs/commands/conform.md``, "--report".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from int4_lora.integration.conformance.report.breakdown import Breakdown, breakdowns
from int4_lora.integration.conformance.report.drawing import draw
from int4_lora.integration.conformance.report.error_map import ErrorMap, error_map
from int4_lora.integration.conformance.report.meanings import RULES
from int4_lora.reference.conformance import Outcome
from int4_lora.reference.conformance.evidence import JudgedCall

__all__ = ["Failure", "Number", "failures_of"]

NUMBERS = 4  # wrong elements that are shown with their values
NO_ROOM = "The map is left out, so that the page stays small."


@dataclass(frozen=True)
class Number:
    """A wrong element of a result.

    Args:
        place: "token 3, output 8".
        result: what the backend returned.
        exact: the exact answer.
        error: the distance between them.
        allowed: the bound, or "equal".
    """

    place: str
    result: str
    exact: str
    error: str
    allowed: str


@dataclass(frozen=True)
class Failure:
    """A failed case.

    Args:
        anchor: the name of its place in the page.
        outcome: the outcome.
        demand: what the rule that it broke demands.
        image: the address of the heat map, or "".
        no_image: why there is none, or "".
        legend: the classes in the map, with what they mean.
        unit: of the errors in the map.
        wrong: the number of wrong elements.
        elements: the number of all elements.
        divided: where the wrong elements are.
        numbers: the first wrong elements.
    """

    anchor: str
    outcome: Outcome
    demand: str
    image: str = ""
    no_image: str = ""
    legend: tuple[tuple[int, str], ...] = ()
    unit: str = ""
    wrong: int = 0
    elements: int = 0
    divided: tuple[Breakdown, ...] = ()
    numbers: tuple[Number, ...] = ()


def failures_of(
    outcomes: Sequence[Outcome],
    anchors: Mapping[str, str],
    take: Callable[[str], bool],
    most: int | None,
) -> list[Failure]:
    """Return failed cases as the page shows them.

    Args:
        outcomes: the failures.
        anchors: the place of each case in the page.
        take: whether an image still fits into the page.
        most: the number of failures that get a map; None for all.
    """
    return [
        _failure(outcome, anchors[outcome.case], take, most is None or index < most)
        for index, outcome in enumerate(outcomes)
    ]


def _failure(outcome: Outcome, anchor: str, take: Callable[[str], bool], in_full: bool) -> Failure:
    bare = Failure(anchor, outcome, RULES.get(outcome.rule, ""))
    call = None if outcome.evidence is None else outcome.evidence.failure
    if call is None or not in_full:
        return bare
    function = outcome.case.split("/")[0]
    drawn = error_map(function, call)
    if drawn is None:
        return bare
    image = draw(drawn)
    fits = take(image)
    present = sorted(set(drawn.classes.flatten().tolist()))
    return Failure(
        anchor,
        outcome,
        bare.demand,
        image=image if fits else "",
        no_image="" if fits else NO_ROOM,
        legend=tuple((each, drawn.unit.labels[each]) for each in present),
        unit=drawn.unit.name,
        wrong=int(drawn.wrong.sum()),
        elements=drawn.wrong.numel(),
        divided=tuple(breakdowns(function, call, drawn.wrong)),
        numbers=_numbers(call, drawn),
    )


def _numbers(call: JudgedCall, drawn: ErrorMap) -> tuple[Number, ...]:
    numbers = []
    for row, column in drawn.wrong.nonzero()[:NUMBERS].tolist():
        got, exact = call.result[row, column].item(), call.held.exact[row, column].item()
        bound = float(call.held.bound[row, column])
        equal = call.finding is not None and call.finding.rule == "equal"
        numbers.append(
            Number(
                f"{drawn.rows.name} {row}, {drawn.columns.name} {column}",
                f"{got:.9g}",
                f"{exact:.9g}",
                f"{abs(got - exact):.3g}",
                "equal" if equal else f"{bound:.3g}",
            )
        )
    return tuple(numbers)
