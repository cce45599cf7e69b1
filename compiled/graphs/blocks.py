"""A base, or its gradient, computed block by block of rows, outside of a graph.

    y[:, rows] = x W[rows]^T      a graph decodes W[rows], and the vendor's GEMM multiplies
    y = RN_x(y + deltas + bias)   a graph adds the adapters and the bias
    dx += g[:, rows] W[rows]      in the accumulation dtype; g is the gradient of y

All blocks of a shape share a graph, so that tracing and compiling take as long for a layer of any
number of rows. A decoded block is discarded after its product.

Source: ``compiled/formulations/formulation.py`` for ``Blocks``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.formulations.formulation import Blocks, layer_of
from int4_lora.compiled.graphs.cache import compile_graph, graph_key, graph_of
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["Decoder", "base_by_blocks", "decoders", "finish", "gradient_by_blocks"]


@dataclass(frozen=True, eq=False)
class _Part:
    """A block of rows.

    Args:
        start: the first row.
        stop: the row after the last.
        weight: the rows, in the memory of the whole weight.
    """

    start: int
    stop: int
    weight: PreparedWeight


# by weight and rows of a block; a part must not keep its weight alive
_parts: WeakKeyDictionary[PreparedWeight, dict[int, list[list[_Part]]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Decoder:
    """A graph that decodes parts of one shape, and these parts.

    Args:
        function: takes a part and returns its dense weight, transposed.
        parts: the parts.
    """

    function: Callable[[PreparedWeight], Tensor]
    parts: Sequence[_Part]


def base_by_blocks(
    x: Tensor, weight: PreparedWeight, decoders: Sequence[Decoder], dtype: torch.dtype
) -> Tensor:
    """Return ``x W^T`` in ``dtype``, its outputs in the order in which the blocks are decoded.

    Args:
        x: ``[tokens, in_features]``.
        weight: the weight.
        decoders: returned by ``decoders``.
        dtype: the dtype of both factors.
    """
    factor = weight.arrange(x.to(dtype))
    y = factor.new_empty(x.shape[0], weight.out_features)
    for decoder in decoders:
        for part in decoder.parts:
            torch.mm(factor, decoder.function(part.weight), out=y[:, part.start : part.stop])
    return y


def gradient_by_blocks(g: Tensor, weight: PreparedWeight, decoders: Sequence[Decoder]) -> Tensor:
    """Return ``g W`` in the accumulation dtype, its columns in the order of ``arrange``.

    Args:
        g: ``[tokens, out_features]``.
        weight: the weight.
        decoders: returned by ``decoders``, for blocks in the accumulation dtype and in order.
    """
    g = g.to(accumulation_dtype(g))
    total = g.new_empty(g.shape[0], weight.in_features)
    beta = 0  # the first product replaces what the memory holds
    for decoder in decoders:
        for part in decoder.parts:
            rows = decoder.function(part.weight).T
            torch.addmm(total, g[:, part.start : part.stop], rows, beta=beta, out=total)
            beta = 1
    return total


def decoders(weight: PreparedWeight, blocks: Blocks) -> list[Decoder]:
    """Return a decoder for each shape of block; the first of a shape compiles its graph."""
    return [
        Decoder(_decoder(parts[0].weight, blocks), parts)
        for parts in _same_shapes(weight, blocks.rows)
    ]


def finish(
    blocks: Blocks,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Sequence[PreparedSlice]], Tensor]:
    """Return the function of the graph that follows the blocks."""

    def finished(
        base: Tensor,
        x: Tensor,
        adapter_ids: Tensor | None,
        bias: Tensor | None,
        slices: Sequence[PreparedSlice],
    ) -> Tensor:
        ordered = base if blocks.in_order is None else blocks.in_order(base)
        return layer_of(ordered, x, slices, adapter_ids, bias)

    return finished


def _same_shapes(weight: PreparedWeight, rows: int) -> list[list[_Part]]:
    """Return the parts of a weight, those of a shape together; the same objects at each call."""
    known = _parts.setdefault(weight, {})
    if rows not in known:
        parts = [
            _Part(start, stop, weight.part(start, stop)) for start, stop in weight.blocks(rows)
        ]
        by_shape = itertools.groupby(parts, lambda part: part.weight.signature)
        known[rows] = [list(group) for _, group in by_shape]
    return known[rows]


def _decoder(part: PreparedWeight, blocks: Blocks) -> Callable[[PreparedWeight], Tensor]:
    """Return the graph that decodes parts of the shape of ``part``."""
    first = part.tensors[0]
    bucket = (first.shape[0], first.shape[0])  # nothing is symbolic
    key = graph_key(("decoded", blocks.dtype, part.signature), bucket, (), part.tensors, first)
    graph = graph_of(key)
    if graph is None:

        def decoded(_: Tensor, part: PreparedWeight) -> Tensor:
            return blocks.decoded(part, blocks.dtype)

        graph = compile_graph(key, bucket, decoded, "inductor", (first, part), part.tensors)
    direct, guarded, places = graph.direct, graph.guarded, graph.places
    if direct is None:
        return lambda part: guarded(part.tensors[0], part)
    indices = [place - 1 for place in places]  # 0 would be a number of tokens

    def call(part: PreparedWeight) -> Any:
        tensors = part.tensors
        return direct(*[tensors[index] for index in indices])[0]

    return call
