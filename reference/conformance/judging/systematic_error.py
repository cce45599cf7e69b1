"""Whether errors go one way: a statistic over many draws.

With the errors as fractions of their bounds, the mean of honest errors is near 0: roundings to
nearest go up as often as down. A mean further from 0 than 0.02 and five standard errors is a bias,
also where no element is beyond its bound. It is taken with the sign of the error, and with the
error towards zero counted as negative.

Source: TOSA's conformance tests, "bias" over a test set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.reference.conformance.judging.verdict import Finding

__all__ = ["bias_of_errors"]

ALLOWED = 0.02
STANDARD_ERRORS = 5.0


def bias_of_errors(errors: Tensor, exact: Tensor, bounds: Tensor) -> Finding | None:
    """Return a finding if errors go one way.

    Args:
        errors: result less exact answer: float64, of any shape.
        exact: the exact answers, of that shape.
        bounds: their bounds, of that shape; elements without a finite positive one do not count.

    Example:
        >>> bounds = torch.ones(10_000)
        >>> bias_of_errors(0.1 * bounds, bounds, bounds).rule
        'bias'
    """
    counted = bounds.isfinite() & (bounds > 0)
    fractions = errors[counted] / bounds[counted]
    if fractions.numel() < 2:
        return None
    for way, sign in (("up", torch.ones_like(fractions)), ("outwards", exact[counted].sign())):
        values = fractions * sign
        mean = float(values.mean())
        noise = float(values.std()) / values.numel() ** 0.5
        if abs(mean) > ALLOWED + STANDARD_ERRORS * noise:
            return Finding(
                "bias",
                f"over {values.numel()} elements errors go {way} by {mean:.3g} bounds in the mean "
                f"(standard error {noise:.2g}): they are not roundings to nearest",
            )
    return None
