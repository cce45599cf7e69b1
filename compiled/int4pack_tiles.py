"""Products with dequantised blocks of rows of torch's INT4 layout for CPUs.

A byte of a block holds a code of its first half of rows and one of its second half. So what comes
out of bytes side by side is rows of the first half, and as many of the second:

- ``paired``, for bfloat16: both weights of a byte are put into one 32-bit word, beside each other,
  and the columns of the product are put in order afterwards. All vectors then have 32-bit lanes,
  which Inductor's conversions are written for, and rounding costs four integer instructions.
- ``halves``, for everything else: each half is a tensor, and a product, of its own.

Weights come out transposed, since a block is stored column by column.

Source: ``int4_lora.compiled.int4pack_weight`` for the layout; round to nearest even in integers is
that of ``c10/util/BFloat16.h`` of PyTorch.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from int4_lora.compiled.int4pack_weight import Int4PackWeight

__all__ = ["base", "halves", "paired"]

UPPER, LOWER = -(2**16), 2**16 - 1  # the two 16-bit halves of a word


def base(x: Tensor, weight: Int4PackWeight, rows: int) -> Tensor:
    """Return ``x W^T`` in x's dtype, ``rows`` of W at a time.

    Args:
        x: ``[tokens, in_features]``.
        weight: the weight.
        rows: a multiple of its block.
    """
    whole = weight.out_features // weight.block * weight.block
    starts = range(0, whole, rows)
    pairs = x.dtype == weight.scale_dtype == torch.bfloat16 and sys.byteorder == "little"
    part = _of_pairs if pairs else _of_halves
    scales = scales_of(weight, torch.float32 if pairs else weight.scale_dtype)
    parts = [part(x, weight, start, min(start + rows, whole), scales) for start in starts]
    found = [_in_order(torch.cat(parts, dim=1), weight.block)] if pairs and parts else parts
    if whole < weight.out_features:
        found.append(x @ weight.columns(whole, weight.out_features, x.dtype))
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def scales_of(weight: Int4PackWeight, dtype: torch.dtype) -> Tensor:
    """Return the scales out of the table, side by side: ``[groups, out_features]``.

    They are the product of the table with (1, 0): exact, but -0 becomes 0. A product is kept in
    memory by Inductor; a slice would be fused into every use, which would gather each weight's.
    """
    flat = weight.table.view(-1, 2).to(dtype)
    first = torch.tensor([[1.0], [0.0]], dtype=dtype, device=flat.device)
    return (flat @ first).view(weight.table.shape[:2])


def paired(weight: Int4PackWeight, start: int, stop: int, scales: Tensor) -> Tensor:
    """Return rows of the dense weight, transposed, in bfloat16: both of a byte beside each other.

    Args:
        weight: with scales in bfloat16.
        start: the first row of a block.
        stop: the row after the last of a block.
        scales: what ``scales_of`` returned, in float32.

    Returns:
        ``[in_features, stop - start]``: block by block, row by row of its first half, each with the
        row of the second half that shares its bytes.
    """
    low, high = _codes_and_scales(weight, start, stop, scales)
    words = (_rounded(high) & UPPER) | ((_rounded(low) >> 16) & LOWER)
    return words.reshape(weight.in_features, -1).view(torch.bfloat16)


def halves(
    weight: Int4PackWeight, start: int, stop: int, scales: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """Return the first and the second half of the rows of some whole blocks, transposed.

    Args:
        weight: the weight.
        start: the first row of a block.
        stop: the row after the last of a block.
        scales: what ``scales_of`` returned.
        dtype: what to cast to.

    Returns:
        Two ``[in_features, (stop - start) / 2]``, block by block.
    """
    both = _codes_and_scales(weight, start, stop, scales.float())
    return [half.to(weight.scale_dtype).to(dtype).reshape(weight.in_features, -1) for half in both]


def _codes_and_scales(
    weight: Int4PackWeight, start: int, stop: int, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``(q - z) * s`` in float32, exact, of the two halves of the rows of some blocks."""
    groups, half = weight.table.shape[0], weight.block // 2
    blocks = weight.data[start:stop].view(-1, groups, weight.columns_of_a_scale, half)
    words = blocks.permute(1, 2, 0, 3).to(torch.int32)  # [groups, columns, blocks, half]
    scale = scales[:, start:stop].reshape(groups, 1, -1, 2, half)
    low, high = (words & 15) - 8, (words >> 4) - 8
    return low.float() * scale[:, :, :, 0], high.float() * scale[:, :, :, 1]


def _rounded(values: Tensor) -> Tensor:
    """Return float32 ``values`` rounded to bfloat16 in the upper half of each word; int32.

    A NaN stays one: what bfloat16 scales make has no bits below those that are added to.
    """
    bits = values.view(torch.int32)
    return bits + 0x7FFF + ((bits >> 16) & 1)


def _of_pairs(x: Tensor, weight: Int4PackWeight, start: int, stop: int, scales: Tensor) -> Tensor:
    return x @ paired(weight, start, stop, scales)


def _in_order(product: Tensor, block: int) -> Tensor:
    """Return the outputs of whole blocks in order, from pairs."""
    tokens, outputs = product.shape
    pairs = product.view(tokens, outputs // block, block // 2, 2)
    return pairs.transpose(2, 3).reshape(product.shape)


def _of_halves(x: Tensor, weight: Int4PackWeight, start: int, stop: int, scales: Tensor) -> Tensor:
    products = [x @ half for half in halves(weight, start, stop, scales, x.dtype)]
    shape = (x.shape[0], (stop - start) // weight.block, weight.block // 2)
    parts = [product.view(shape) for product in products]
    return torch.stack(parts, dim=2).flatten(1)  # [tokens, blocks, half, row]
