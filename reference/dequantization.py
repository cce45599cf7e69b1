"""From codes to weights: w = (q - z) * s, rounded once.

Every strategy is one rule. Row i of the weight has row i' of the scale table, column j has
column j' of it, and the pair picks the scale and the zero-point:

========  =========  ====================
strategy  i'         j'
========  =========  ====================
tensor    0          0
channel   i          0
group     i          j // g, or g_idx[j]
block     i // rows  j // columns
========  =========  ====================

An FP4 weight has codes c and scales that are divided by a global scale S: w = c * s / S, rounded
once to bfloat16. Float64 sums take it unrounded.

Source: ``compressed_tensors/quantization/lifecycle/forward.py``; the single rounding was
checked against it over every float16 and bfloat16 scale
(``tests/integration/checkpoint/test_compressed_tensors.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.reference.checks import X_DTYPES
from int4_lora.reference.float4 import code_values, group_scales, unrounded_float4
from int4_lora.reference.float4_weight import BaseWeight, Float4Weight, check_weight, dense_dtype
from int4_lora.reference.packed_weight import PackedWeight
from int4_lora.reference.packing import unpack
from int4_lora.reference.rounding import round_once

__all__ = [
    "centred_codes",
    "dequantize",
    "exact_weight",
    "linear_weight",
    "rounded_weight",
    "scale_columns",
    "scale_of_each_weight",
    "scale_rows",
    "unrounded_weight",
    "zero_points",
]


def dequantize(weight: BaseWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Return the dense weight, ``w[i, j] = RN((q[i, j] - z[i', j']) * s[i', j'])`` for INT4.

    RN rounds to nearest even in the dtype of the scale: one rounding, since q - z is a small
    integer and exact. Signs of zero, infinities and NaN follow from the multiplication.

    For FP4, ``w[i, j] = RN(c[i, j] * s[i, j // g] / S)``: RN rounds once, to ``dtype``, which is
    bfloat16 by default; in float64 it is the quotient that float64 division gives.

    Args:
        weight: the packed weight, or the FP4 weight.
        dtype: if given, the rounded weight of a PackedWeight is then cast to it, and that of a
            Float4Weight is rounded to it instead.

    Returns:
        ``[out_features, in_features]`` in the scale's dtype, or bfloat16 for FP4, or ``dtype``.

    Raises:
        TypeError: ``weight`` is neither a PackedWeight nor a Float4Weight, or ``dtype`` is not a
            float dtype.

    Example:
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> dequantize(PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8)))
        tensor([[-4.0000, -3.5000, -3.0000, -2.5000, -2.0000, -1.5000, -1.0000,  3.5000]])
    """
    check_weight(weight)
    if dtype is not None and dtype not in X_DTYPES:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if isinstance(weight, Float4Weight):
        return round_once(unrounded_float4(weight), dense_dtype(weight) if dtype is None else dtype)
    scale = scale_of_each_weight(weight)
    dense = centred_codes(weight).to(scale.dtype) * scale
    return dense if dtype is None else dense.to(dtype)


def linear_weight(weight: BaseWeight, accumulate: torch.dtype) -> Tensor:
    """Return the weight that the linears multiply, where sums are in ``accumulate``.

    It is ``exact_weight`` for float64 sums, else ``rounded_weight``, in the dtype of the sums.
    """
    if accumulate == torch.float64:
        return exact_weight(weight)
    return rounded_weight(weight).to(accumulate)


def exact_weight(weight: BaseWeight) -> Tensor:
    """Return the weight of the float64 truth: ``[out_features, in_features]``, float64.

    That of a PackedWeight is rounded to the dtype of its scales, that of a Float4Weight is not.
    """
    return dequantize(weight, torch.float64)


def rounded_weight(weight: BaseWeight) -> Tensor:
    """Return the weight in the dtype to which the linears round it, which float32 may hold."""
    return dequantize(weight)


def unrounded_weight(weight: BaseWeight, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return ``(q - z) * s`` multiplied in ``dtype``: ``[out_features, in_features]``.

    In float64 it is exact: the weight without the rounding of ``dequantize``. An FP4 weight is
    rounded from float64 to ``dtype``.
    """
    if isinstance(weight, Float4Weight):
        return round_once(unrounded_float4(weight), dtype)
    return centred_codes(weight).to(dtype) * scale_of_each_weight(weight).to(dtype)


def centred_codes(weight: BaseWeight) -> Tensor:
    """Return ``q - z`` of every weight: int16 ``[out_features, in_features]``, exact.

    Of an FP4 weight, the values of its codes: float64.
    """
    if isinstance(weight, Float4Weight):
        return code_values(weight)
    codes = unpack(weight.packed, weight.in_features, bits=weight.bits).to(torch.int16)
    zero_point = zero_points(weight)
    if zero_point is None:
        return codes
    rows, columns = scale_rows(weight), scale_columns(weight)
    return codes - zero_point.to(torch.int16)[rows[:, None], columns]


def zero_points(weight: PackedWeight) -> Tensor | None:
    """Return the table of zero-points: int8, one for each entry of the scale table, or None."""
    if weight.zero_point is None:
        return None
    if weight.zero_point.dtype == torch.int32:
        return unpack(weight.zero_point, weight.out_features, bits=weight.bits, dim=0)
    return weight.zero_point.reshape(-1, weight.scale.shape[-1])


def scale_of_each_weight(weight: BaseWeight) -> Tensor:
    """Return the scale of every weight: ``[out_features, in_features]``.

    Of an FP4 weight, the scale over the global scale, in float64.
    """
    if isinstance(weight, Float4Weight):
        scale = group_scales(weight)
        if weight.global_scale is not None:
            scale = scale / weight.global_scale.to(torch.float64)
        return scale.repeat_interleave(weight.group_size, dim=1)
    table = weight.scale.reshape(-1, weight.scale.shape[-1])  # [1, 1] for one scale per tensor
    return table[scale_rows(weight)[:, None], scale_columns(weight)]


def scale_rows(weight: PackedWeight) -> Tensor:
    """Return i', the row of the scale table for each output: int64 ``[out_features]``."""
    rows = torch.arange(weight.out_features, device=weight.packed.device)
    if weight.scale.ndim == 1:
        return torch.zeros_like(rows)
    if isinstance(weight.group_size, tuple):
        return rows // weight.group_size[0]
    return rows


def scale_columns(weight: PackedWeight) -> Tensor:
    """Return j', the column of the scale table for each input: int64 ``[in_features]``."""
    if weight.g_idx is not None and not weight.column_order:
        return weight.g_idx.to(torch.int64)
    columns = torch.arange(weight.in_features, device=weight.packed.device)
    if isinstance(weight.group_size, tuple):
        return columns // weight.group_size[1]
    return columns // (weight.in_features // weight.scale.shape[-1])
