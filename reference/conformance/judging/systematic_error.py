"""Whether errors have a systematic part: a statistic over many draws.

Rounding to nearest goes up as often as down, so the mean of honest errors, as fractions of their
bounds, is near 0. A mean further from 0 than 0.02 plus five standard errors is a systematic error,
even where no element is beyond its bound. The mean is taken twice: of the errors as they are, and
with errors away from zero positive and errors towards zero negative.

Source: TOSA's conformance tests, "bias" over a test set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from int4_lora.reference.conformance.judging.verdict import Finding

__all__ = ["MeanError", "mean_errors", "systematic_error"]

ALLOWED = 0.02
STANDARD_ERRORS = 5.0


class MeanError(NamedTuple):
    """The mean of errors as fractions of their bounds.

    Args:
        way: the direction that counts as positive: "up", or "outwards", away from zero.
        mean: in bounds.
        noise: its standard error.
        elements: the number of errors.
    """

    way: str
    mean: float
    noise: float
    elements: int

    @property
    def systematic(self) -> bool:
        """Whether the mean is too far from 0 for roundings to nearest."""
        return abs(self.mean) > ALLOWED + STANDARD_ERRORS * self.noise


def mean_errors(errors: Tensor, exact: Tensor, bounds: Tensor) -> tuple[MeanError, ...]:
    """Return the mean error up and outwards, or nothing for fewer than two elements.

    Args:
        errors: result minus exact answer: float64, of any shape.
        exact: the exact answers, of the same shape.
        bounds: their bounds, of the same shape; only finite, positive ones count.
    """
    counted = bounds.isfinite() & (bounds > 0)
    fractions = errors[counted] / bounds[counted]
    if fractions.numel() < 2:
        return ()
    means = []
    for way, sign in (("up", torch.ones_like(fractions)), ("outwards", exact[counted].sign())):
        values = fractions * sign
        noise = float(values.std()) / values.numel() ** 0.5
        means.append(MeanError(way, float(values.mean()), noise, values.numel()))
    return tuple(means)


def systematic_error(errors: Tensor, exact: Tensor, bounds: Tensor) -> Finding | None:
    """Return a finding if the mean of the errors is too far from 0, or None.

    Args:
        errors: result minus exact answer: float64, of any shape.
        exact: the exact answers, of the same shape.
        bounds: their bounds, of the same shape; only finite, positive ones count.

    Example:
        >>> bounds = torch.ones(10_000)
        >>> systematic_error(0.1 * bounds, bounds, bounds).rule
        'systematic_error'
    """
    for error in mean_errors(errors, exact, bounds):
        if error.systematic:
            return Finding(
                "systematic_error",
                f"over {error.elements} elements errors go {error.way} by {error.mean:.3g} bounds "
                f"in the mean (standard error {error.noise:.2g}): they are not roundings to "
                "nearest",
            )
    return None
