"""Compiled layers: one graph per formulation, layer shape and bucket of tokens.

Every graph gets a code object of its own, because torch counts recompiles per code object: forty
layer shapes in one process are forty graphs, not forty recompiles of one, and none makes another's
sizes dynamic.

Source: ``torch._dynamo``'s documentation of ``recompile_limit`` and ``mark_dynamic``;
``torch._dynamo.pgo``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import GATHERED_TOKENS, add_terms
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.graphs.direct_entry import DirectEntry, is_transformed
from int4_lora.compiled.layouts.layout import PreparedWeight

__all__ = ["bucket_of", "graph_of", "run", "run_terms"]

MOST_TOKENS = 2**31 - 1
LAST_TOKENS = {  # the adapters' identity may not change in one; 2^13 rows are indexed in 32 bits
    "cpu": (1, GATHERED_TOKENS["cpu"][0], 2**15),
    "cuda": (1, GATHERED_TOKENS["cuda"][0], 2**13),
}

_graphs: dict[Hashable, Callable[..., Tensor]] = {}
_GUARDS_CAN_GO = hasattr(torch.compiler, "keep_tensor_guards_unsafe")  # torch 2.8 and later
_lock = threading.Lock()


def bucket_of(tokens: int, device: str = "cpu") -> tuple[int, int]:
    """Return the bucket that a number of tokens falls in: the first and the last of it.

    Example:
        >>> bucket_of(5)
        (2, 24)
    """
    first = 1
    for last in LAST_TOKENS.get(device, LAST_TOKENS["cuda"]):
        if tokens <= last:
            return first, last
        first = last + 1
    return first, MOST_TOKENS


def run(
    formulation: Formulation,
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Run a formulation: its graph, compiled at the first call of its kind, or its one call."""
    if formulation.one_call and not slices and bias is None:
        return formulation.layer(x, weight, slices, None, None)
    bucket = bucket_of(x.shape[0], x.device.type)
    slices = tuple(dataclasses.replace(one) for one in slices)  # as they are now: update() may come
    key = _key(formulation, x, weight, slices, adapter_ids, bias)
    graph = _graphs.get(key)
    if graph is None:
        backend = formulation.backend(weight, bucket) if formulation.backend else "inductor"
        layer = _within(bucket, formulation.layer)
        plain = _plain(x, adapter_ids, bias)
        graph = _compiled(key, bucket, layer, backend, plain)
    x = _dynamic(x, bucket)
    bias = None if bias is None else bias.detach().resolve_neg().contiguous()
    adapter_ids = None if adapter_ids is None else _dynamic(adapter_ids, bucket)
    return graph(x, weight, slices, adapter_ids, bias)


def graph_of(
    formulation: Formulation,
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Callable[..., Tensor] | None:
    """Return the graph that ``run`` takes for these operands, or None if it was not made yet."""
    return _graphs.get(_key(formulation, x, weight, slices, adapter_ids, bias))


def _key(
    formulation: Formulation,
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Hashable:
    """Return what the graph of a layer is told by."""
    bucket = bucket_of(x.shape[0], x.device.type)
    operands = _operands((x, adapter_ids, bias), slices, weight.tensors)
    return formulation.name, weight.signature, bucket, operands, _settings()


def run_terms(
    base: Tensor, x: Tensor, slices: Sequence[PreparedSlice], adapter_ids: Tensor
) -> Tensor:
    """Run ``lora_terms.add_terms`` on a base that was computed elsewhere."""
    bucket = bucket_of(x.shape[0], x.device.type)
    slices = tuple(dataclasses.replace(one) for one in slices)
    operands = _operands((base, x, adapter_ids), slices, ())
    key = ("terms", x.device, bucket, operands, _settings())
    graph = _graphs.get(key)
    if graph is None:
        terms = _within(bucket, _terms)
        graph = _compiled(key, bucket, terms, "inductor", _plain(base, x, adapter_ids))
    base, x, adapter_ids = (_dynamic(one, bucket) for one in (base, x, adapter_ids))
    return graph(base, x, slices, adapter_ids)


def _terms(base: Tensor, x: Tensor, slices: Sequence[PreparedSlice], adapter_ids: Tensor) -> Tensor:
    return add_terms(base, x, slices, adapter_ids, None)


def _within(bucket: tuple[int, int], function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same function with the bucket written into its graph.

    Torch keeps graphs on disk with the range of tokens that they were made for, and finds them by
    what is in them: where another version of this package had other buckets, it would take one of
    those, and stop at its range.
    """

    def bounded(*operands: Any) -> Tensor:
        tokens = operands[0].shape[0]
        torch._check(tokens >= bucket[0])  # type: ignore[no-untyped-call]
        torch._check(tokens <= bucket[1])  # type: ignore[no-untyped-call]
        return function(*operands)

    return bounded


def _compiled(
    key: Hashable,
    bucket: tuple[int, int],
    function: Callable[..., Tensor],
    backend: Any,
    plain: bool,
) -> Callable[..., Tensor]:
    """Return the graph of a key, which another thread may have made first.

    Its key says all that Dynamo's guards on plain operands would, and costs less.
    """
    guards: dict[str, Any] | None = None
    direct = plain and bucket[1] < MOST_TOKENS  # else guards say up to how many tokens it is right
    if plain and _GUARDS_CAN_GO:
        guards = {"guard_filter_fn": _kept_guards}
    with _lock:
        made: Callable[..., Tensor] = _own_code(function, key)
        if direct:
            made = DirectEntry(made, backend, guards)
        else:
            made = torch.compile(made, fullgraph=plain, backend=backend, options=guards)
        return _graphs.setdefault(key, made)


def _kept_guards(guards: Sequence[Any]) -> list[bool]:
    """Return which guards stay: those on no operand, such as torch's settings and modes."""
    return [not one.name for one in guards]


def _settings() -> tuple[Hashable, ...]:
    """Return what of torch's settings often differs: a recompile of one code object is counted."""
    return torch.get_default_dtype(), torch.get_num_threads(), is_transformed()


def _plain(*operands: Tensor | None) -> bool:
    """Return whether the key can say all of the operands: no subclasses, no transforms."""
    plain = all(one is None or type(one) in (Tensor, torch.nn.Parameter) for one in operands)
    return plain and not is_transformed()


def _dynamic(operand: Tensor, bucket: tuple[int, int]) -> Tensor:
    """Return an operand by tokens as graphs expect it: contiguous, any number of a bucket.

    The last bucket is given no range: kernels on a GPU index in 32 bits up to some number of
    tokens, and a graph that may not be limited to it cannot be made.
    """
    strides = (operand.shape[1], 1) if operand.ndim == 2 else (1,)  # one row has one stride, too
    operand = operand.detach().resolve_neg().contiguous().as_strided(operand.shape, strides)
    if bucket[1] == MOST_TOKENS:
        torch._dynamo.mark_dynamic(operand, 0)
    elif bucket[0] > 1:
        torch._dynamo.mark_dynamic(operand, 0, min=bucket[0], max=bucket[1])
    return operand


def _operands(
    tensors: Sequence[Tensor | None], slices: Sequence[PreparedSlice], others: Sequence[Tensor]
) -> tuple[Hashable, ...]:
    """Return what a graph is specialised on of the operands, the number of tokens left out."""
    adapters = tuple(
        (one.start, one.finite, *(_whole(tensor) for tensor in (one.a, one.bt, one.scaling)))
        for one in slices
    )
    identities = [id(tensor) for one in slices for tensor in (one.a, one.bt, one.scaling)]
    identities += map(id, others)
    shared = len(set(identities)) < len(identities)  # then the graph has fewer inputs
    pattern = tuple(identities.index(one) for one in identities) if shared else ()
    return (*(_by_tokens(one) for one in tensors), adapters, pattern)


def _by_tokens(operand: Tensor | None) -> tuple[Hashable, ...]:
    """Return what a graph is specialised on of an operand whose number of rows is not."""
    if operand is None:
        return ()
    return operand.dtype, operand.shape[1:], type(operand), operand.is_inference()


def _whole(operand: Tensor) -> tuple[Hashable, ...]:
    return operand.dtype, operand.shape, operand.stride(), type(operand), operand.is_inference()


def _own_code(function: Callable[..., Tensor], key: Hashable) -> Callable[..., Tensor]:
    """Return the same function with a code object of its own, under a name of its own.

    Dynamo remembers by file, line and name which sizes it has seen change, in some set-ups across
    processes. Under one name a second layer's sizes would all be symbols: other kernels, compiled
    in minutes.
    """
    assert isinstance(function, FunctionType)
    own = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    copy = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{own}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
