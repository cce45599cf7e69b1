"""All cases, and how some of them are chosen.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from int4_lora.reference.conformance.cases.behaviour import behaviour_cases
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.format import format_cases
from int4_lora.reference.conformance.cases.linear import linear_cases
from int4_lora.reference.conformance.cases.lora import lora_cases
from int4_lora.reference.conformance.cases.lora_part import lora_part_cases

__all__ = ["CASES", "select"]

CASES: tuple[Case, ...] = (
    *format_cases(),
    *linear_cases(),
    *lora_cases(),
    *lora_part_cases(),
    *behaviour_cases(),
)
"""Every case, in the order in which they run."""


def select(patterns: str | None = None, *, quick: bool = False) -> tuple[Case, ...]:
    """Return the cases to run.

    Args:
        patterns: names with ``*`` and ``?``, separated by commas, or None for all but those that
            are optional. An optional case is named in full.
        quick: only those of the quick run.

    Raises:
        ValueError: a pattern that no case has.

    Example:
        >>> [case.name for case in select("pack/r*")]
        ['pack/ragged']
    """
    if patterns is None:
        return tuple(one for one in CASES if not one.optional and (one.quick or not quick))
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    if not wanted:
        raise ValueError("no case is named: the pattern is empty")
    for pattern in wanted:
        if not any(_named(one, pattern) for one in CASES):
            raise ValueError(f"no case is named {pattern!r}; names are {CASES[0].name!r} and so on")
    found = (one for one in CASES if any(_named(one, pattern) for pattern in wanted))
    return tuple(one for one in found if one.quick or not quick)


def _named(case: Case, pattern: str) -> bool:
    """Return whether a pattern names a case; an optional one is named in full."""
    return case.name == pattern if case.optional else fnmatchcase(case.name, pattern)
