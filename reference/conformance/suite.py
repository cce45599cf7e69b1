"""All cases, and how to select some of them.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

from int4_lora.reference.conformance.cases.behaviour import behaviour_cases
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.experts import expert_cases
from int4_lora.reference.conformance.cases.float4 import float4_cases
from int4_lora.reference.conformance.cases.format import format_cases
from int4_lora.reference.conformance.cases.layouts import layout_cases
from int4_lora.reference.conformance.cases.linear import linear_cases
from int4_lora.reference.conformance.cases.lora import lora_cases

__all__ = ["CASES", "select", "unknown_case"]

CASES: tuple[Case, ...] = (
    *format_cases(),
    *linear_cases(),
    *lora_cases(),
    *behaviour_cases(),
    *layout_cases(),
    *float4_cases(),
    *expert_cases(),
)
"""Every case, in the order in which they run."""


def select(patterns: str | None = None, *, quick: bool = False) -> tuple[Case, ...]:
    """Return the cases to run.

    Args:
        patterns: names with ``*``, ``?`` and ``[...]``, separated by commas; None for all but the
            optional cases, which have to be named in full.
        quick: whether to return only the cases of the quick run.

    Raises:
        ValueError: a pattern that matches no case.

    Example:
        >>> [case.name for case in select("pack/r*")]
        ['pack/ragged']
    """
    if patterns is None:
        return tuple(case for case in CASES if not case.optional and (case.quick or not quick))
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not wanted:
        raise ValueError("no case is named: the pattern is empty")
    for pattern in wanted:
        if not any(_matches(case, pattern) for case in CASES):
            raise unknown_case(pattern)
    named = (case for case in CASES if any(_matches(case, pattern) for pattern in wanted))
    return tuple(case for case in named if case.quick or not quick)


def unknown_case(name: str) -> ValueError:
    """Return the error for a name or pattern that matches no case, with the nearest name."""
    near = get_close_matches(name, [case.name for case in CASES], n=1, cutoff=0)
    return ValueError(f"no case is named {name!r}; did you mean {near[0]!r}?")


def _matches(case: Case, pattern: str) -> bool:
    """Return whether a pattern matches a case's name; an optional case is named in full."""
    return case.name == pattern if case.optional else fnmatchcase(case.name, pattern)
