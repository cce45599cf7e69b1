"""Report the error of a merge into INT4, for each module and in total.

relative error = |W' - W_merged| / |W_merged|, in Frobenius norms, with W_merged exact in float64
and W' the dequantised result. It is also the expected relative error of x W'^T, if the columns of
x are independent and identically distributed.

delta kept = <W' - W, D> / <D, D>, with the base W and D = W_merged - W: the share of what the
adapters add that is in the result. 0 is the base itself, 1 all of it.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["LEAST_KEPT", "MOST_ERROR", "REPORT", "MergeRefusedError", "accepted_report"]

REPORT = "merge_report.json"
MOST_ERROR = 0.2  # relative: twice the error of quantising normal weights in groups
WORST = 5  # the number of modules that the report and the error name
LEAST_KEPT = 0.5  # of what the adapters add; below it, the command says that it is lost
SUMS = ("squared_error", "minmax_squared_error", "squared_norm", "squared_delta", "kept_delta")


class MergeRefusedError(ValueError):
    """The error of a module is larger than allowed.

    Args:
        message: the error message, which names the modules and a remedy.
        report: the report of the refused merge.
    """

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def accepted_report(
    reports: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], max_error: float
) -> dict[str, Any]:
    """Return the report of a merge, or refuse the merge.

    Args:
        reports: the report of each module, from ``RequantizedModule.run``.
        settings: the settings of the merge, which the report repeats.
        max_error: the largest relative error of a module.

    Raises:
        MergeRefusedError: the error of a module is larger than ``max_error``, or NaN.
    """
    modules = [
        {"module": report["module"], **_ratios(report), "max_error": report["max_error"]}
        for report in sorted(reports, key=lambda report: str(report["module"]))
    ]
    worst = sorted(modules, key=lambda module: -module["relative_error"])
    report = {
        **settings,
        "total": _ratios({name: math.fsum(part[name] for part in reports) for name in SUMS}),
        "worst": [module["module"] for module in worst[:WORST]],
        "modules": modules,
    }
    refused = [module for module in worst if not module["relative_error"] <= max_error]
    if refused:
        names = ", ".join(
            f"{module['module']} {module['relative_error']:.4g}" for module in refused[:WORST]
        )
        raise MergeRefusedError(
            f"{len(refused)} of {len(modules)} modules lose more than --max-error "
            f"{max_error:g}: {names}; a larger one accepts what was computed",
            report,
        )
    return report


def _ratios(sums: Mapping[str, Any]) -> dict[str, float]:
    """Return the ratios that are reported, from sums of squares and products."""
    norm = sums["squared_norm"]
    return {
        "relative_error": _ratio(sums["squared_error"], norm),
        "relative_error_minmax": _ratio(sums["minmax_squared_error"], norm),
        "relative_delta": _ratio(sums["squared_delta"], norm),
        "delta_kept": sums["kept_delta"] / sums["squared_delta"] if sums["squared_delta"] else 1.0,
    }


def _ratio(part: float, whole: float) -> float:
    """Return the ratio of two norms, given their squares."""
    if whole == 0:
        return 0.0 if part == 0 else math.inf
    return math.sqrt(part / whole)
