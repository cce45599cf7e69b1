"""Round weights to the dtype of their scales, in graphs as well.

W = RN_s( (q - z) * s )

Inductor computes 16-bit numbers in float32, and omits the casts between steps that it fuses. Here
the product is computed in float32, which holds it exactly, and rounded by arithmetic that is no
cast, so that it stays.

Source: ``c10/util/BFloat16.h`` of PyTorch for rounding to nearest even in integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["UPPER", "bfloat16_bits", "rounded", "scaled"]

UPPER = -(2**16)  # the upper half of a word
SMALLEST_NORMAL, STEP = 2.0**-14, 2.0**-24  # of float16; numbers below have a fixed step
LARGEST = 65504.0  # of float16
LOST_BITS = 13  # of a float32's significand in float16


def scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``RN(codes * scale)``, rounded to the dtype of the scales.

    Args:
        codes: integers of at most 9 bits, in any dtype.
        scale: float16, bfloat16 or float32, of a shape that broadcasts with ``codes``.
        dtype: the dtype of the scales; None for that of ``scale``, which a graph may have widened.

    Returns:
        The products in ``dtype``; in a graph, 16-bit products are held in float32.

    Example:
        >>> scaled(torch.tensor([3, -8]), torch.tensor([1.0078125], dtype=torch.bfloat16))
        tensor([ 3.0312, -8.0625], dtype=torch.bfloat16)
    """
    dtype = dtype or scale.dtype
    if dtype == torch.float32 or not torch.compiler.is_compiling():
        return codes.to(dtype) * scale
    return rounded(codes.to(torch.float32) * scale.to(torch.float32), dtype)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 ``values`` rounded to ``dtype``, in float32.

    Args:
        values: float32 of any shape.
        dtype: float16, bfloat16 or float32.
    """
    if dtype == torch.float32 or not torch.compiler.is_compiling():
        return values.to(dtype).to(torch.float32)
    return _to_bfloat16(values) if dtype == torch.bfloat16 else _to_float16(values)


def bfloat16_bits(values: Tensor) -> Tensor:
    """Return int32 words whose upper halves are float32 ``values`` rounded to bfloat16.

    A NaN stays a NaN if its 16 low bits are 0, so that nothing is carried. NaN of bfloat16 scales
    are such on a CPU; a GPU has a NaN of its own, all of whose bits are 1.
    """
    bits = values.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def _is_nan(values: Tensor) -> Tensor:
    """Return where values are NaN; Inductor's ``isnan`` for CPUs is a loop over elements."""
    return torch.ne(values, values)


def _to_bfloat16(values: Tensor) -> Tensor:
    near = (bfloat16_bits(values) & UPPER).view(torch.float32)
    return torch.where(_is_nan(values), values, near)


def _to_float16(values: Tensor) -> Tensor:
    bits = values.view(torch.int32)
    half = 2 ** (LOST_BITS - 1)
    bits = (bits + (half - 1) + ((bits >> LOST_BITS) & 1)) & -(2**LOST_BITS)
    normal = bits.view(torch.float32)
    normal = torch.where(normal.abs() > LARGEST, normal * torch.inf, normal)
    small = torch.round(values * (1 / STEP)) * STEP
    near = torch.where(values.abs() < SMALLEST_NORMAL, small, normal)
    return torch.where(_is_nan(values), values, near)
