"""What merging into INT4 cost, module by module and in all.

relative error = |W' - W_merged| / |W_merged|, Frobenius norms, W_merged exact in float64 and W' as
it is dequantised. For x whose columns are independent and alike it is also the relative error of
x W'^T that is to be expected.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["REPORT", "WORST", "Acceptance", "MergeRefusedError"]

REPORT = "merge_report.json"
WORST = 5  # modules that are named
SUMS = ("squared_error", "minmax_squared_error", "squared_norm", "squared_delta")


class MergeRefusedError(ValueError):
    """A module lost more than was allowed; the report says what each lost.

    Args:
        message: which modules, and what to do.
        report: the report that would have been written.
    """

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = report


class Acceptance:
    """Turns what the modules report into the result's report, or refuses.

    Args:
        max_error: the largest relative error of a module.
        said: what the report says of how it was merged.
    """

    def __init__(self, max_error: float, said: Mapping[str, Any]) -> None:
        if not max_error >= 0:
            raise ValueError(f"max_error must be 0 or more, got {max_error}")
        self.max_error, self.said = max_error, said

    def __call__(self, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the report.

        Raises:
            MergeRefusedError: a module's error is larger than ``max_error``, or is no number.
        """
        modules = sorted((_of_module(one) for one in reports), key=lambda one: one["module"])
        sums = {name: math.fsum(one[name] for one in reports) for name in SUMS}
        worst = sorted(modules, key=lambda one: -one["relative_error"])
        report = {
            **self.said,
            "total": _of_sums(sums),
            "worst": [one["module"] for one in worst[:WORST]],
            "modules": modules,
        }
        over = [one for one in worst if not one["relative_error"] <= self.max_error]
        if over:
            named = ", ".join(
                f"{one['module']} {one['relative_error']:.4g}" for one in over[:WORST]
            )
            raise MergeRefusedError(
                f"{len(over)} of {len(modules)} modules lose more than --max-error "
                f"{self.max_error:g}: {named}; a larger one accepts what was computed",
                report,
            )
        return report


def _of_module(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a module's part of the report."""
    return {
        "module": found["module"],
        **_of_sums(found),
        "max_error": found["max_error"],
    }


def _of_sums(sums: Mapping[str, float]) -> dict[str, float]:
    """Return ratios of norms from sums of squares."""
    return {
        "relative_error": _ratio(sums["squared_error"], sums["squared_norm"]),
        "relative_error_minmax": _ratio(sums["minmax_squared_error"], sums["squared_norm"]),
        "relative_delta": _ratio(sums["squared_delta"], sums["squared_norm"]),
    }


def _ratio(part: float, whole: float) -> float:
    """Return the ratio of two norms, from their squares."""
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return math.sqrt(part / whole)
