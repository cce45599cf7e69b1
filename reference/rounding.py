"""Rounding float64 once to a narrower dtype.

A conversion of float64 to float16 or bfloat16 may go through float32 and round twice. Rounding
to float32 "to odd" first keeps what the second rounding needs to know: a value that is not exact
in float32 gets an odd last bit, so that it cannot look like a tie.

Source: S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums: proved
algorithms using rounding to odd", IEEE Transactions on Computers 57 (2008), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_once", "round_to_odd"]


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest even in ``dtype``, once, whatever the dtype of ``value``.

    Args:
        value: a float tensor of any shape.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        The rounded tensor, in ``dtype``.

    Example:
        >>> tie_and_a_bit = torch.tensor(1 + 2**-11 + 2**-40, dtype=torch.float64)
        >>> (round_once(tie_and_a_bit, torch.float16) - 1).item() == 2**-10
        True
    """
    if value.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    return round_to_odd(value).to(dtype)


def round_to_odd(value: Tensor) -> Tensor:
    """Return float64 values in float32, with an odd last bit where they are not exact in it.

    Rounded further, to float16 or bfloat16, the result is ``value`` rounded once.

    Args:
        value: float64 of any shape.

    Example:
        >>> values = torch.tensor([1.0, 1 + 2**-40, 1 + 2**-22 - 2**-40], dtype=torch.float64)
        >>> round_to_odd(values) - 1
        tensor([0.0000e+00, 1.1921e-07, 1.1921e-07])
    """
    near = value.to(torch.float32)
    inexact = near.to(torch.float64) != value  # NaN is not equal to itself, and stays NaN
    beyond = near.to(torch.float64).abs() > value.abs()
    toward_zero = torch.where(beyond, torch.nextafter(near, torch.zeros_like(near)), near)
    odd = (toward_zero.view(torch.int32) | 1).view(torch.float32)
    return torch.where(inexact & ~value.isnan(), odd, near)
