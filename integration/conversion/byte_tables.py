"""Dequantise packed weights by table lookup: bit-identical to the reference, but faster.

A byte holds two 4-bit codes or one 8-bit code. For each of the 256 bytes, a table holds the byte's
codes side by side in the scale's dtype, so looking up the bytes of a row gives the codes of the
row. The rest is the reference's arithmetic: q - z is exact in each of these dtypes, and the product
with the scale is rounded once.

Source: ``int4_lora.reference.dequantization``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, dequantize
from int4_lora.reference.dequantization import zero_points

__all__ = ["dense_rows"]

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # a table entry's dtype, by its bytes


def dense_rows(weight: PackedWeight) -> Tensor:
    """Return the dense weight in the scale's dtype, as ``dequantize`` does.

    Args:
        weight: a weight on the CPU.

    Returns:
        ``[out_features, in_features]``.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = quantize(torch.randn(8, 64), group_size=32)
        >>> torch.equal(dense_rows(weight), dequantize(weight))
        True
    """
    rows, columns = weight.shape
    ragged = columns % (32 // weight.bits) != 0
    if ragged or weight.strategy not in ("channel", "group"):
        return dequantize(weight)
    codes, scale, zeros = _codes(weight), weight.scale, zero_points(weight)
    if zeros is not None:
        zeros = zeros.to(scale.dtype)
    if weight.column_order:
        groups = codes.view(rows, scale.shape[1], -1)
        if zeros is not None:
            groups.sub_(zeros[:, :, None])
        return groups.mul_(scale[:, :, None]).view(rows, columns)
    assert weight.g_idx is not None, "without g_idx, columns are in order"
    group = weight.g_idx.to(torch.int64)
    if zeros is not None:
        codes -= zeros.index_select(1, group)
    return codes.mul_(scale.index_select(1, group))


def _codes(weight: PackedWeight) -> Tensor:
    """Return the codes in the scale's dtype: ``[out_features, in_features]``."""
    packed_bytes = weight.packed.contiguous().view(torch.uint8).flatten().to(torch.int32)
    entries = _table(weight.bits, weight.scale.dtype).index_select(0, packed_bytes)
    return entries.view(weight.scale.dtype).view(weight.shape)


@functools.cache
def _table(bits: int, dtype: torch.dtype) -> Tensor:
    """Return each byte's codes, the lowest bits first, as one integer: ``[256]``."""
    byte = torch.arange(256)
    codes = [(byte >> shift) % 2**bits - 2 ** (bits - 1) for shift in range(0, 8, bits)]
    table = torch.stack(codes, dim=1).to(dtype)
    return table.view(WORDS[table.shape[1] * dtype.itemsize]).flatten()
