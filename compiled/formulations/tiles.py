"""Many tokens: dequantise a block of rows, multiply with the vendor GEMM, discard it.

y[:, rows] = RN_x( x W[rows]^T ),  block of rows by block of rows

Both factors have ``factor_dtype``, to which the GEMM rounds its result: ``base_rounded=True``. W is
rounded by arithmetic that torch.compile cannot omit (``rounding.py``): ``weight_rounded=True``.

On a CPU a graph decodes a block, and the GEMM is called outside of graphs (``graphs/blocks.py``).
There is then a graph for each shape of block, and not one of all blocks, which takes long to
compile. Products in 16 bits for few tokens stay within the layer's graph: ``int4pack_tiles.py``
says why.

Source: ``int4_lora.reference.dequantize``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from int4_lora.compiled.formulations import int4pack_tiles
from int4_lora.compiled.formulations.formulation import Blocks, Formulation
from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.products import BATCHED_TOKENS, factor_dtype

__all__ = ["TILES", "WORKSPACE_BYTES", "base", "blocks_of"]

WORKSPACE_BYTES = {  # of one dequantised block of rows
    "cpu": 4 * 2**20,  # measured with 2 threads, 1 MiB of L2 and 32 MiB of L3
    "cuda": 64 * 2**20,  # a GEMM needs many outputs at a time; not measured
}
WORKSPACE_BYTES_OF_A_THREAD = 2 * 2**20  # for a thread's own blocks; measured with 2 threads


def base(x: Tensor, weight: PreparedWeight, workspace: int | None = None) -> Tensor:
    """Return ``x W^T`` in ``factor_dtype``, as part of a graph.

    Args:
        x: ``[tokens, in_features]``.
        weight: returned by ``prepare``.
        workspace: the bytes of one dequantised block of rows; None for the device's default.
    """
    dtype = factor_dtype(x, weight.scale_dtype)
    x = weight.arrange(x.to(dtype))
    if isinstance(weight, Int4PackWeight):
        return int4pack_tiles.base(x, weight, workspace or WORKSPACE_BYTES_OF_A_THREAD)
    parts = [
        x @ weight.rows(start, stop, dtype).T
        for start, stop in weight.blocks(_rows_of_a_block(weight, dtype, workspace))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def blocks_of(x: Tensor, weight: PreparedWeight) -> Blocks | None:
    """Return how to compute the base outside of graphs, or None if it is part of the layer's."""
    dtype = factor_dtype(x, weight.scale_dtype)
    few = x.shape[0] <= BATCHED_TOKENS and dtype == x.dtype and dtype.itemsize == 2
    if x.device.type != "cpu" or few:
        return None
    pairs = isinstance(weight, Int4PackWeight) and int4pack_tiles.decodes_pairs(weight, dtype)
    in_order = _in_order(weight.tile) if pairs else None
    return Blocks(_rows_of_a_block(weight, dtype), dtype, _decoded, in_order)


def _rows_of_a_block(
    weight: PreparedWeight, dtype: torch.dtype, workspace: int | None = None
) -> int:
    workspace = workspace or WORKSPACE_BYTES.get(weight.device.type, WORKSPACE_BYTES["cuda"])
    return workspace // (dtype.itemsize * weight.in_features)


def _decoded(part: PreparedWeight, dtype: torch.dtype) -> Tensor:
    """Return a dense weight, transposed."""
    if isinstance(part, Int4PackWeight):
        return int4pack_tiles.decoded(part, dtype)
    return part.rows(0, part.out_features, dtype).T


@functools.cache
def _in_order(block: int) -> functools.partial[Tensor]:
    return functools.partial(int4pack_tiles.in_order, block=block)


TILES = Formulation(
    name="tiles",
    base=base,
    layout=PreparedWeight,
    weight_rounded=True,
    base_rounded=True,
    blocks=blocks_of,
)
