"""Packed weights made dense through tables of bytes: the reference's weights, bit for bit, faster.

A byte holds two codes of 4 bits or one of 8. A table gives for each of the 256 bytes its codes in
the dtype of the scales, side by side, so that looking up the bytes of a row gives the row. What
follows is the reference's arithmetic: q - z is exact in every one of these dtypes, and the product
with the scale is rounded once.

Source: ``int4_lora.reference.dequantization``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, dequantize, unpack

__all__ = ["dense_rows"]

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # what holds an entry, by its bytes


def dense_rows(weight: PackedWeight) -> Tensor:
    """Return the dense weight in the scale's dtype, as ``dequantize`` does.

    Args:
        weight: on the CPU.

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
    scale, zeros = weight.scale, _zero_points(weight)
    codes = _codes(weight)
    if weight.column_order:
        shape = (rows, scale.shape[1], -1)
        centred = codes.view(shape) if zeros is None else codes.view(shape).sub_(zeros[:, :, None])
        return centred.mul_(scale[:, :, None]).view(rows, columns)
    assert weight.g_idx is not None, "it says the order of columns"
    group = weight.g_idx.to(torch.int64)
    if zeros is not None:
        codes -= zeros.index_select(1, group)
    return codes.mul_(scale.index_select(1, group))


def _codes(weight: PackedWeight) -> Tensor:
    """Return the codes in the scale's dtype: ``[out_features, in_features]``."""
    places = weight.packed.contiguous().view(torch.uint8).flatten().to(torch.int32)
    found = _table(weight.bits, weight.scale.dtype).index_select(0, places)
    return found.view(weight.scale.dtype).view(weight.shape)


def _zero_points(weight: PackedWeight) -> Tensor | None:
    """Return the zero-points in the scale's dtype: ``[out_features, groups]``, or None."""
    if weight.zero_point is None:
        return None
    found = unpack(weight.zero_point, weight.out_features, bits=weight.bits, dim=0)
    return found.to(weight.scale.dtype)


@functools.cache
def _table(bits: int, dtype: torch.dtype) -> Tensor:
    """Return the codes of every byte, the lowest first, as one integer: ``[256]``."""
    byte = torch.arange(256)
    codes = [(byte >> shift) % 2**bits - 2 ** (bits - 1) for shift in range(0, 8, bits)]
    table = torch.stack(codes, dim=1).to(dtype)
    return table.view(WORDS[table.shape[1] * dtype.itemsize]).flatten()
