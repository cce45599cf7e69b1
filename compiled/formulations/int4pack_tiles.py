"""Multiply by dequantised blocks of rows of torch's INT4 layout for CPUs.

A byte of a block holds the codes of two rows, one from each half of the block
(``layouts/int4pack.py``). So consecutive bytes decode to two runs of consecutive rows:

- ``paired``, for bfloat16, puts both weights of a byte side by side into one 32-bit word, and puts
  the columns of the product in order afterwards. All vectors then have 32-bit lanes, which
  Inductor's conversions are written for, and rounding costs four integer instructions.
- ``in_rows``, for everything else, writes the runs where the rows belong.

Weights are decoded transposed, since a block is stored column by column. Within a graph, a tile is
decoded in as many parts as there are threads and multiplied as a batch, so that each thread
multiplies the weights that it dequantised. One product of the whole tile would be split by columns,
dequantising by groups: half of the tile would cross from core to core, which at times made the
layer take 1.6 times as long for few tokens.

Source: ``compiled/rounding.py`` for rounding to nearest even in integers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.products import first_of_pairs
from int4_lora.compiled.rounding import UPPER, bfloat16_bits, rounded

__all__ = [
    "Tile",
    "base",
    "decoded",
    "decodes_pairs",
    "in_order",
    "in_rows",
    "paired",
    "scales_of",
]

LOWER = 2**16 - 1  # the lower half of a word


@dataclass(frozen=True)
class Tile:
    """Consecutive whole blocks of rows.

    Args:
        first: the first block.
        parts: the number of parts.
        blocks: blocks per part.
    """

    first: int
    parts: int
    blocks: int

    @property
    def stop(self) -> int:
        """The block after the tile's last one."""
        return self.first + self.parts * self.blocks


def base(x: Tensor, weight: Int4PackWeight, workspace: int) -> Tensor:
    """Return ``x W^T`` in x's dtype, computed tile by tile of rows.

    Args:
        x: ``[tokens, in_features]``.
        weight: the weight.
        workspace: bytes of dequantised rows per thread.
    """
    blocks = weight.out_features // weight.block
    whole = blocks * weight.block
    most = max(1, workspace // (x.dtype.itemsize * weight.in_features * weight.block))
    pairs = decodes_pairs(weight, x.dtype)
    scales = scales_of(weight)
    parts = [
        _multiplied(x, _dense(weight, tile, scales, x.dtype))
        for tile in _tiles(blocks, _threads(), most)
    ]
    if whole < weight.out_features:
        parts.append(x @ weight.columns(whole, weight.out_features, x.dtype))
    product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return in_order(product, weight.block) if pairs else product


def decoded(weight: Int4PackWeight, dtype: torch.dtype) -> Tensor:
    """Return a dense weight, transposed: ``[in_features, out_features]``.

    Args:
        weight: whole blocks of rows, or the rows after the last whole block.
        dtype: the dtype to return. Where ``decodes_pairs``, rows are in the order of ``paired``.
    """
    blocks = weight.out_features // weight.block
    if not blocks:
        return weight.columns(0, weight.out_features, dtype)
    scales = scales_of(weight)
    return _dense(weight, Tile(0, 1, blocks), scales, dtype)[0]


def decodes_pairs(weight: Int4PackWeight, dtype: torch.dtype) -> bool:
    """Return whether ``paired`` decodes the weight for products in a dtype; else ``halves``."""
    return dtype == weight.scale_dtype == torch.bfloat16 and sys.byteorder == "little"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    return torch.get_num_threads()


def _tiles(blocks: int, threads: int, most: int) -> list[Tile]:
    """Return tiles that cover all blocks: one part per thread, fewer in the last tile."""
    found, first = [], 0
    while first < blocks:
        parts = min(threads, blocks - first)
        each = min(most, (blocks - first) // parts)
        found.append(Tile(first, parts, each))
        first += parts * each
    return found


def scales_of(weight: Int4PackWeight) -> Tensor:
    """Return the table's scales without the offsets: float32 ``[groups, out_features]``.

    A slice would be fused into every use, which gathers the scale of each weight. Scales in 16 bits
    would make Inductor's vectors twice as wide, and reinterpreting the bits of such vectors is a
    loop over their elements: decoding took 12 times as long.

    Args:
        weight: the weight.
    """
    flat = weight.table.reshape(-1, 2).to(torch.float32)
    return first_of_pairs(flat).view(weight.table.shape[:2])


def _dense(weight: Int4PackWeight, tile: Tile, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tile's rows of the dense weight, transposed: ``[parts, in_features, rows]``."""
    if decodes_pairs(weight, dtype):
        return paired(weight, tile, scales)
    return in_rows(weight, tile, scales, dtype)


def paired(weight: Int4PackWeight, tile: Tile, scales: Tensor) -> Tensor:
    """Return a tile's rows of the dense weight in bfloat16, transposed, rows of a byte adjacent.

    Args:
        weight: a weight with bfloat16 scales.
        tile: the blocks to decode.
        scales: returned by ``scales_of``.

    Returns:
        ``[parts, in_features, rows of a part]``, blocks in order. In a block, each row of the first
        half is followed by the row of the second half that shares its bytes.
    """
    low, high = _codes_and_scales(weight, tile, scales)
    words = (bfloat16_bits(high) & UPPER) | ((bfloat16_bits(low) >> 16) & LOWER)
    return words.reshape(tile.parts, weight.in_features, -1).view(torch.bfloat16)


def in_rows(weight: Int4PackWeight, tile: Tile, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tile's rows of the dense weight, transposed, in the order of rows.

    Args:
        weight: the weight.
        tile: the blocks to decode.
        scales: returned by ``scales_of``.
        dtype: the dtype to return.

    Returns:
        ``[parts, in_features, rows of a part]``.
    """
    both = _codes_and_scales(weight, tile, scales)
    halves = [_rounded(half, weight.scale_dtype).to(dtype) for half in both]
    return torch.stack(halves, dim=4).reshape(tile.parts, weight.in_features, -1)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``values`` as ``rounded`` does; a NaN of bfloat16 scales needs no case of its own."""
    if dtype != torch.bfloat16:
        return rounded(values, dtype)
    return (bfloat16_bits(values) & UPPER).view(torch.float32)


def _codes_and_scales(weight: Int4PackWeight, tile: Tile, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(q - z) * s`` in float32, exact, for the two halves of the rows of a tile's blocks.

    Both are ``[parts, groups, columns, blocks, half]``.
    """
    groups, half = weight.table.shape[0], weight.block // 2
    rows = slice(tile.first * weight.block, tile.stop * weight.block)
    shape = (tile.parts, tile.blocks, groups, weight.columns_of_a_scale, half)
    words = weight.data[rows].view(shape).permute(0, 2, 3, 1, 4).to(torch.int32)
    scale = scales[:, rows].reshape(groups, tile.parts, tile.blocks, 2, half).transpose(0, 1)
    low, high = (words & 15) - 8, (words >> 4) - 8
    return low.float() * scale[:, :, None, :, 0], high.float() * scale[:, :, None, :, 1]


def _multiplied(x: Tensor, parts: Tensor) -> Tensor:
    """Return the product of x with all parts: ``[tokens, rows of the tile]``."""
    products = x.unsqueeze(0).expand(parts.shape[0], *x.shape) @ parts
    return products.transpose(0, 1).flatten(1)


def in_order(product: Tensor, block: int) -> Tensor:
    """Return outputs in the order of rows, those of whole blocks given in that of ``paired``."""
    tokens, outputs = product.shape
    whole = outputs // block * block
    pairs = product[:, :whole].view(tokens, -1, block // 2, 2)
    rows = pairs.transpose(2, 3).reshape(tokens, whole)
    return rows if whole == outputs else torch.cat([rows, product[:, whole:]], dim=1)
