"""The gradient of x through the base: dequantise W again, multiply, discard it.

dx = g W,  g the gradient of y

W and g are multiplied in ``factor_dtype``, as in the formulation ``tiles``. A product sums in the
accumulation dtype; on a CPU it rounds its result to the factors' dtype. All rows of W are decoded
at once up to ``BLOCK_BYTES``, so that the product is rounded once. Above, blocks of rows are summed
in the accumulation dtype. Where that is the factors' dtype on a CPU, nothing is rounded between
blocks, and ``graphs/blocks.py`` computes the same outside of a graph.

Source: the derivative of ``int4_lora.reference.int4_linear``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from int4_lora.compiled.formulations.int4pack_tiles import (
    Tile,
    decodes_pairs,
    in_rows,
    paired,
    scales_of,
)
from int4_lora.compiled.layouts.grouped import GroupedWeight
from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.products import factor_dtype, narrow_product
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["BLOCK_BYTES", "in_order_of_x", "through_base"]

BLOCK_BYTES = 256 * 2**20  # of dequantised rows at a time


def through_base(g: Tensor, weight: PreparedWeight, dtype: torch.dtype) -> Tensor:
    """Return ``g W``, with its columns in the order of x.

    Args:
        g: ``[tokens, out_features]``, the gradient of y.
        weight: the weight.
        dtype: the dtype of the result.

    Returns:
        ``[tokens, in_features]``.
    """
    sums = accumulation_dtype(g)
    g = g.to(factor_dtype(g, weight.scale_dtype))
    total = None
    for some, rows in _factors(g, weight):
        part = narrow_product(some, rows, sums)
        total = part if total is None else total.to(sums) + part.to(sums)
    assert total is not None, "a weight has rows"
    return in_order_of_x(total.to(dtype), weight)


def in_order_of_x(gradient: Tensor, weight: PreparedWeight) -> Tensor:
    """Return a gradient, whose columns have the order of ``weight.arrange``, in that of x."""
    if isinstance(weight, GroupedWeight) and weight.order is not None:
        return torch.zeros_like(gradient).index_copy(1, weight.order.to(torch.int64), gradient)
    return gradient


def _factors(g: Tensor, weight: PreparedWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield columns of ``g`` and the rows of W that they multiply, until all rows are used."""
    most_rows = BLOCK_BYTES // (g.dtype.itemsize * weight.in_features)
    if isinstance(weight, Int4PackWeight):
        yield from _of_int4pack(g, weight, most_rows)
        return
    for start, stop in weight.blocks(most_rows):
        yield g[:, start:stop], weight.rows(start, stop, g.dtype)


def _of_int4pack(
    g: Tensor, weight: Int4PackWeight, most_rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors of a weight in torch's layout: columns of g follow the rows as decoded."""
    block = weight.block
    blocks = weight.out_features // block
    pairs = decodes_pairs(weight, g.dtype)
    scales = scales_of(weight)
    each = max(1, most_rows // block)
    for first in range(0, blocks, each):
        tile = Tile(first, 1, min(each, blocks - first))
        columns = g[:, tile.first * block : tile.stop * block]
        if pairs:
            order = columns.reshape(g.shape[0], tile.blocks, 2, block // 2)
            yield order.transpose(2, 3).flatten(1), paired(weight, tile, scales)[0].T
        else:
            yield columns, in_rows(weight, tile, scales, g.dtype)[0].T
    if blocks * block < weight.out_features:
        rest = slice(blocks * block, weight.out_features)
        yield g[:, rest], weight.columns(rest.start, rest.stop, g.dtype).T
