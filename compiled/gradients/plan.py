"""Plan the gradients of a call: the entries of their graphs, from the same cache as the layer's.

Source: ``compiled/graphs/entry.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.formulations.tiles import blocks_of
from int4_lora.compiled.gradients.adapter import Wanted, through_adapter
from int4_lora.compiled.gradients.base import in_order_of_x, through_base
from int4_lora.compiled.graphs.blocks import Decoder, decoders, gradient_by_blocks
from int4_lora.compiled.graphs.cache import is_plain
from int4_lora.compiled.graphs.entry import Entry, TupleEntry, entry_of, tuple_entry_of
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["plan_adapter_gradients", "plan_gradient"]


@dataclass(eq=False)
class _ByBlocks:
    """The entry of a gradient that is computed block by block.

    Args:
        weight: the weight.
        decoders: returned by ``decoders``.
        dtype: the dtype of the result.
    """

    weight: PreparedWeight
    decoders: Sequence[Decoder]
    dtype: torch.dtype

    def __call__(self, g: Tensor) -> Tensor:
        total = gradient_by_blocks(g, self.weight, self.decoders)
        return in_order_of_x(total.to(self.dtype), self.weight)


def plan_gradient(g: Tensor, weight: PreparedWeight, dtype: torch.dtype) -> Entry:
    """Return the entry of ``through_base``; the first plan of a key compiles its graphs.

    Where both factors are in the accumulation dtype on a CPU, it is computed by blocks.

    Args:
        g: ``[tokens, out_features]``, at least one token.
        weight: returned by ``prepare``.
        dtype: the dtype of the result.

    Returns:
        ``entry(g)``, which returns the gradient of x.
    """
    blocks = blocks_of(g, weight) if is_plain((g,)) else None
    if blocks is not None and blocks.dtype == accumulation_dtype(g):
        return _ByBlocks(weight, decoders(weight, blocks), dtype)

    def gradient(g: Tensor, slices: tuple[()], weight: PreparedWeight) -> Tensor:
        return through_base(g, weight, dtype)

    kind = ("gradient", dtype, weight.signature)
    return entry_of(kind, gradient, lambda bucket: "inductor", (g,), (), (), weight)


def plan_adapter_gradients(
    g: Tensor, x: Tensor | None, uses: Tensor, part: PreparedSlice, wanted: Wanted
) -> TupleEntry:
    """Return the entry of ``through_adapter``.

    Args:
        g: ``[tokens, out_features]``, at least one token.
        x: ``[tokens, in_features]``, or None.
        uses: bool ``[tokens]``, whether a token uses the adapter.
        part: a slice with a single adapter.
        wanted: which gradients to compute.

    Returns:
        ``entry(g, x, uses)``, which returns a tuple of gradients.
    """

    def gradients(
        g: Tensor, x: Tensor | None, uses: Tensor, slices: tuple[PreparedSlice]
    ) -> tuple[Tensor, ...]:
        return through_adapter(g, x, uses, slices[0], wanted)

    kind = ("adapter gradients", g.shape[1], wanted)
    return tuple_entry_of(kind, gradients, lambda bucket: "inductor", (g, x, uses), (), (part,))
