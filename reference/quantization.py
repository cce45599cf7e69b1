"""From weights to codes: min-max quantisation in a stated order and arithmetic.

Quantisers differ in order and dtype, which flips codes. This one computes, per group:

1. lo = min(w, 0) and hi = max(w, 0) over the group, so that 0 is always representable
2. symmetric: s = max(-lo, hi) / ((2**bits - 1) / 2) and z = 0;
   asymmetric: s = (hi - lo) / (2**bits - 1)
3. s is rounded to the scale's dtype; a scale of 0 becomes that dtype's eps
4. asymmetric: z = round(clamp(low - lo / s)), low being the smallest code
5. q = round(clamp(w / s + z))

in float32, or float64 for a float64 weight; ``round`` is half to even, ``clamp`` is to the codes.

Source: ``calculate_qparams`` in ``compressed_tensors/quantization/utils/helpers.py``, which gives
the same codes for float32 weights and scales. It divides in the dtype of the weight and its scale
in steps 4 and 5, which for bfloat16 flips about one code in 200.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.reference.checks import SCALE_DTYPES, X_DTYPES, check_dtype, check_shape
from int4_lora.reference.packed_weight import PackedWeight
from int4_lora.reference.packing import code_range, pack
from int4_lora.reference.rounding import round_once

__all__ = ["quantize", "quantize_groups"]


@torch.no_grad()
def quantize(
    weight: Tensor,
    *,
    group_size: int | None = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> PackedWeight:
    """Quantise a dense weight to 4 bits, min-max, one scale per row and group.

    A weight whose code was not clamped is off by at most half its scale:
    ``|w - (q - z) * s| <= s / 2``.

    Args:
        weight: ``[out_features, in_features]``, float16, bfloat16, float32 or float64.
        group_size: columns that share a scale; it must divide in_features. None means one group
            for the whole row.
        symmetric: whether all zero-points are 0.
        scale_dtype: float16, bfloat16 or float32; by default the dtype of ``weight``, or float32
            for a float64 weight.

    Returns:
        The packed weight; its scale is ``[out_features, in_features / group_size]``.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a weight that is not 2-D, not finite or too large for ``scale_dtype``, or a
            group size that does not divide.

    Example:
        >>> packed = quantize(torch.tensor([[7.5, -3.0, 1.0, 0.0]]), group_size=None)
        >>> packed.scale.item(), hex(packed.packed.item())  # 7, -3, 1, 0, each plus 8
        (1.0, '0x895f')
    """
    check_dtype("weight", weight, X_DTYPES)
    check_shape("weight", weight, (None, None), "[out_features, in_features]")
    rows, columns = weight.shape
    if 0 in (rows, columns):
        raise ValueError(f"weight must have rows and columns, got {[rows, columns]}")
    size = columns if group_size is None else group_size
    if type(size) is not int:
        raise TypeError(f"group_size must be an int or None, got {type(size).__name__}")
    if size < 1 or columns % size:
        raise ValueError(f"group_size must divide in_features = {columns}, got {group_size}")
    if type(symmetric) is not bool:
        raise TypeError(f"symmetric must be a bool, got {type(symmetric).__name__}")
    if scale_dtype is None:
        scale_dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(f"scale_dtype must be float16, bfloat16 or float32, got {scale_dtype}")

    row_of = torch.arange(rows, device=weight.device)
    column_of = torch.arange(columns, device=weight.device) // size
    codes, scale, zero_point = quantize_groups(
        weight, row_of, column_of, (rows, columns // size), symmetric, scale_dtype, bits=4
    )
    return PackedWeight(
        packed=pack(codes),
        scale=scale,
        shape=(rows, columns),
        zero_point=None if symmetric else pack(zero_point, dim=0),
        group_size=size,
    )


def quantize_groups(
    weight: Tensor,
    row_of: Tensor,
    column_of: Tensor,
    table: tuple[int, int],
    symmetric: bool,
    scale_dtype: torch.dtype,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise in any groups: weight (i, j) has scale (row_of[i], column_of[j]).

    Args:
        weight: ``[out_features, in_features]``, float.
        row_of: int64 ``[out_features]``, the row of the scale table for each output.
        column_of: int64 ``[in_features]``, the column of the scale table for each input.
        table: the shape of the scale table.
        symmetric: whether all zero-points are 0.
        scale_dtype: the dtype of the scale.
        bits: 4 or 8.

    Returns:
        ``(codes, scale, zero_point)``: int8 ``[out_features, in_features]``, ``scale_dtype`` and
        int8 of the table's shape.

    Raises:
        ValueError: a weight that is not finite, or a scale beyond ``scale_dtype``.
    """
    w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    wrong = (~w.isfinite()).nonzero()
    if wrong.numel():
        i, j = wrong[0].tolist()
        raise ValueError(f"weight must be finite, got {w[i, j].item()} at [{i}, {j}]")
    low, high = code_range(bits)

    group_of = (row_of[:, None] * table[1] + column_of).flatten()  # [out * in]
    zeros = torch.zeros(table[0] * table[1], dtype=w.dtype, device=w.device)
    lo = zeros.scatter_reduce(0, group_of, w.flatten(), "amin").reshape(table)  # <= 0
    hi = zeros.scatter_reduce(0, group_of, w.flatten(), "amax").reshape(table)  # >= 0

    exact = torch.maximum(-lo, hi) / ((high - low) / 2) if symmetric else (hi - lo) / (high - low)
    scale = round_once(exact, scale_dtype)
    if not scale.isfinite().all():
        name = str(scale_dtype).removeprefix("torch.")
        raise ValueError(
            f"weight must have scales that are finite in {name}, got {exact.max().item():g} "
            f"for a group from {lo.min().item():g} to {hi.max().item():g}"
        )
    scale = torch.where(scale == 0, torch.finfo(scale_dtype).eps, scale)

    s = scale.to(w.dtype)
    zero_point = torch.zeros_like(s) if symmetric else (low - lo / s).clamp(low, high).round()
    pick = (row_of[:, None], column_of)
    codes = (w / s[pick] + zero_point[pick]).clamp(low, high).round()
    return codes.to(torch.int8), scale, zero_point.to(torch.int8)
