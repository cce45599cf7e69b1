"""Plan a call once from all operands, then call its graph with x and the ids only.

An entry holds a graph and the fixed operands: the weight, the adapters and the bias. It is valid as
long as the shapes of x and the ids, their ``state_of``, and ``finite`` of the adapters' slices are
the same as when it was planned. The tensors that it holds may be written to, not replaced.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.formulations import Formulation
from int4_lora.compiled.formulations.formulation import Backend, Blocks
from int4_lora.compiled.graphs.blocks import Decoder, base_by_blocks, decoders, finish
from int4_lora.compiled.graphs.cache import (
    bucket_of,
    compile_graph,
    graph_key,
    graph_of,
    in_rows,
    is_plain,
    marked,
)
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.selection.choice import choose

__all__ = ["Entry", "TupleEntry", "entry_of", "plan", "plan_terms", "tuple_entry_of"]

Entry = Callable[..., Tensor]
TupleEntry = Callable[..., tuple[Tensor, ...]]
Operands = tuple[Tensor | None, ...]


@dataclass(eq=False)
class _OneCall:
    """The entry of a base alone that is one call of an operator."""

    formulation: Formulation
    weight: PreparedWeight

    def __call__(self, x: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        return self.formulation.base(x, self.weight)


@dataclass(eq=False)
class _Direct:
    """The entry of a compiled graph, without Dynamo.

    Args:
        graph: returned by the backend.
        inputs: the graph's inputs; each call replaces those that change.
        changing: returned by ``_changing``.
    """

    graph: Callable[..., Sequence[Tensor]]
    inputs: list[Any]
    changing: tuple[list[tuple[int, int]], list[int]]

    def __call__(self, *by_tokens: Any) -> Tensor:
        return self.results(*by_tokens)[0]

    def results(self, *by_tokens: Any) -> Sequence[Tensor]:
        """Return all results of the graph."""
        inputs = self.inputs.copy()
        of_operands, of_tokens = self.changing
        for place, index in of_operands:
            operand = by_tokens[index]
            plain = operand.is_contiguous() and not operand.is_neg()  # spares a Python call
            inputs[place] = operand if plain else in_rows(operand)
        for place in of_tokens:
            inputs[place] = by_tokens[0].shape[0]
        return self.graph(*inputs)


@dataclass(eq=False)
class _DirectTuple(_Direct):
    """The entry of a compiled graph that returns a tuple."""

    def __call__(self, *by_tokens: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(self.results(*by_tokens))


@dataclass(eq=False)
class _ByBlocks:
    """The entry of a layer whose base is computed block by block.

    Args:
        weight: the weight.
        decoders: returned by ``decoders``.
        dtype: of both factors.
        finish: puts the outputs in order, adds adapters and bias; None where neither is needed.
    """

    weight: PreparedWeight
    decoders: Sequence[Decoder]
    dtype: torch.dtype
    finish: Entry | None = None

    def __call__(self, x: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        base = base_by_blocks(x, self.weight, self.decoders, self.dtype)
        return base.to(x.dtype) if self.finish is None else self.finish(base, x, adapter_ids)


@functools.cache
def _changing(places: tuple[int, ...], count: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Return which inputs of a graph change from call to call.

    Args:
        places: the index of each input in (number of tokens, *operands' tensors).
        count: how many of these operands have a row for each token; they come first.

    Returns:
        Pairs (position of the input, index of the operand), and the positions of the number of
        tokens.
    """
    numbered = list(enumerate(places))
    of_operands = [(place, at - 1) for place, at in numbered if 0 < at <= count]
    return of_operands, [place for place, at in numbered if at == 0]


@dataclass(eq=False)
class _Guarded:
    """The entry of a compiled graph through Dynamo, which checks guards and may compile again.

    Args:
        graph: returned by torch.compile.
        bucket: the first and the last number of tokens that the graph serves.
        fixed: the operands that follow those of a call: bias, adapters' slices, weight.
    """

    graph: Callable[..., Any]
    bucket: tuple[int, int]
    fixed: tuple[Any, ...]

    def __call__(self, *by_tokens: Tensor | None) -> Any:
        return self.graph(*(marked(operand, self.bucket) for operand in by_tokens), *self.fixed)


def plan(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice] = (),
    adapter_ids: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    formulation: Formulation | None = None,
) -> Entry:
    """Return the entry of a layer; the first plan of a key compiles its graph.

    Args:
        x: ``[tokens, in_features]``, at least one token.
        weight: returned by ``prepare``.
        slices: the adapters, by slice of the outputs.
        adapter_ids: int ``[tokens]``; needed with slices.
        bias: ``[out_features]`` or None. Later writes to it are read only if it is contiguous.
        formulation: the formulation to use; None for that of ``choose``.

    Returns:
        ``entry(x, adapter_ids)``, which returns the layer's result.
    """
    formulation = formulation or choose(weight, x.dtype, x.shape[0], slices)
    if formulation.one_call and not slices and bias is None:
        return _OneCall(formulation, weight)
    blocks = formulation.blocks(x, weight) if formulation.blocks and is_plain((x,)) else None
    if blocks is not None:
        return _plan_blocks(x, weight, slices, adapter_ids, bias, blocks)

    def layer(
        x: Tensor,
        adapter_ids: Tensor | None,
        bias: Tensor | None,
        slices: Sequence[PreparedSlice],
        weight: PreparedWeight,
    ) -> Tensor:
        return formulation.layer(x, weight, slices, adapter_ids, bias)

    def backend(bucket: tuple[int, int]) -> Backend:
        return formulation.backend(weight, bucket) if formulation.backend else "inductor"

    kind = (formulation.name, weight.signature)
    bias = None if bias is None else in_rows(bias.detach())
    return entry_of(kind, layer, backend, (x, adapter_ids), (bias,), slices, weight)


def _plan_blocks(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
    blocks: Blocks,
) -> Entry:
    """Return the entry of a layer whose base is computed block by block."""
    by_blocks = _ByBlocks(weight, decoders(weight, blocks), blocks.dtype)
    if slices or bias is not None or blocks.in_order is not None:
        base = torch.empty(x.shape[0], weight.out_features, dtype=blocks.dtype, device=x.device)
        bias = None if bias is None else in_rows(bias.detach())
        kind = ("after blocks", *base.shape[1:], *x.shape[1:], blocks.in_order)
        function = finish(blocks)
        by_blocks.finish = entry_of(
            kind, function, lambda bucket: "inductor", (base, x, adapter_ids), (bias,), slices
        )
    return by_blocks


def plan_terms(
    base: Tensor, x: Tensor, slices: Sequence[PreparedSlice], adapter_ids: Tensor
) -> Entry:
    """Return the entry of ``add_terms`` on a base that another kernel computed.

    Args:
        base: ``[tokens, out_features]``, at least one token.
        x: ``[tokens, in_features]``.
        slices: the adapters, by slice of the outputs.
        adapter_ids: int ``[tokens]``.

    Returns:
        ``entry(base, x, adapter_ids)``, which returns the sum.
    """
    kind = ("terms", base.shape[1])
    return entry_of(kind, _terms, lambda bucket: "inductor", (base, x, adapter_ids), (), slices)


def _terms(base: Tensor, x: Tensor, adapter_ids: Tensor, slices: Sequence[PreparedSlice]) -> Tensor:
    return add_terms(base, x, slices, adapter_ids, None)


def entry_of(
    kind: Hashable,
    function: Callable[..., Tensor],
    backend: Callable[[tuple[int, int]], Backend],
    by_tokens: Operands,
    bound: Operands,
    slices: Sequence[PreparedSlice],
    *weight: PreparedWeight,
) -> Entry:
    """Return the entry of a function; the first call with a key compiles its graph.

    Args:
        kind: the function, and everything else that its graph depends on and the operands do not
            show: the shapes of ``bound``, the widths of ``by_tokens``.
        function: ``function(*by_tokens, *bound, slices, *weight)`` returns a tensor.
        backend: ``backend(bucket)`` returns the backend that compiles it.
        by_tokens: the operands with a row for each token; the first is not None.
        bound: operands that stay the same objects.
        slices: the adapters, by slice of the outputs.
        weight: the weight, if the function reads it.

    Returns:
        ``entry(*by_tokens)``, which returns the function's result.
    """
    entry: Entry = _entry(_Direct, kind, function, backend, by_tokens, bound, slices, *weight)
    return entry


def tuple_entry_of(
    kind: Hashable,
    function: Callable[..., tuple[Tensor, ...]],
    backend: Callable[[tuple[int, int]], Backend],
    by_tokens: Operands,
    bound: Operands,
    slices: Sequence[PreparedSlice],
    *weight: PreparedWeight,
) -> TupleEntry:
    """Return the entry of a function that returns a tuple of tensors; else as ``entry_of``."""
    entry: TupleEntry = _entry(
        _DirectTuple, kind, function, backend, by_tokens, bound, slices, *weight
    )
    return entry


def _entry(
    direct: type[_Direct],
    kind: Hashable,
    function: Callable[..., Any],
    backend: Callable[[tuple[int, int]], Backend],
    by_tokens: Operands,
    bound: Operands,
    slices: Sequence[PreparedSlice],
    *weight: PreparedWeight,
) -> Any:
    first = by_tokens[0]
    assert first is not None
    bucket = bucket_of(first.shape[0], first.device.type)
    finite = tuple([part.finite for part in slices])  # read once: update() may change it
    tensors = [tensor for part in slices for tensor in part.tensors]
    if weight:
        tensors += weight[0].tensors
    depends = (finite, tuple([part.signature for part in slices]))
    key = graph_key(kind, bucket, depends, tensors, *by_tokens, *bound)
    graph = graph_of(key)
    if graph is None or graph.direct is None:
        parts = zip(slices, finite, strict=True)
        fixed = (tuple(dataclasses.replace(part, finite=value) for part, value in parts), *weight)
        if graph is None:
            given = [*(marked(operand, bucket) for operand in by_tokens), *bound]
            graph = compile_graph(
                key, bucket, function, backend(bucket), (*given, *fixed), (*given, *tensors)
            )
        if graph.direct is None:
            return _Guarded(graph.guarded, bucket, (*bound, *fixed))
    known = (None, *(None for _ in by_tokens), *bound, *tensors)  # x must not be kept alive
    inputs = [known[place] for place in graph.places]
    return direct(graph.direct, inputs, _changing(graph.places, len(by_tokens)))
