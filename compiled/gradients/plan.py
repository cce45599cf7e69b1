"""Plan the gradients of a call: the entries of their graphs, from the same cache as the layer's.

Source: ``compiled/graphs/entry.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.gradients.adapter import Wanted, through_adapter
from int4_lora.compiled.gradients.base import through_base
from int4_lora.compiled.graphs.entry import Entry, TupleEntry, entry_of, tuple_entry_of
from int4_lora.compiled.layouts.layout import PreparedWeight

__all__ = ["plan_adapter_gradients", "plan_gradient"]


def plan_gradient(g: Tensor, weight: PreparedWeight, dtype: torch.dtype) -> Entry:
    """Return the entry of ``through_base``; the first plan of a key compiles its graph.

    Args:
        g: ``[tokens, out_features]``, at least one token.
        weight: returned by ``prepare``.
        dtype: the dtype of the result.

    Returns:
        ``entry(g)``, which returns the gradient of x.
    """

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
