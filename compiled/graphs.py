"""Compiled layers: one graph per formulation, layer shape and bucket of tokens.

Every graph gets a code object of its own, because torch counts recompiles per code object: forty
layer shapes in one process are forty graphs, not forty recompiles of one.

Source: ``torch._dynamo``'s documentation of ``recompile_limit`` and ``mark_dynamic``.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType

import torch
from torch import Tensor

from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.lora_terms import GATHERED_TOKENS
from int4_lora.compiled.prepared_lora import PreparedSlice
from int4_lora.compiled.prepared_weight import PreparedWeight

__all__ = ["bucket_of", "run"]

MOST_TOKENS = 2**31 - 1
LAST_TOKENS = {"cpu": (1, 16), "cuda": (1, 16, GATHERED_TOKENS["cuda"][0])}

_graphs: dict[Hashable, Callable[..., Tensor]] = {}
_lock = threading.Lock()


def bucket_of(tokens: int, device: str = "cpu") -> tuple[int, int]:
    """Return the bucket that a number of tokens falls in: the first and the last of it.

    Example:
        >>> bucket_of(5)
        (2, 16)
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
    adapters = tuple(
        (one.adapters, one.start, one.stop, one.finite, *_described(one.a)) for one in slices
    )
    others = tuple(_described(one) for one in (x, adapter_ids, bias))
    dtype = torch.get_default_dtype()
    key = (formulation.name, weight.signature, bucket, adapters, others, dtype)
    graph = _graphs.get(key)
    if graph is None:
        with _lock:
            backend = formulation.backend(weight, bucket) if formulation.backend else "inductor"
            made = torch.compile(_own_code(formulation.layer), backend=backend)
            graph = _graphs.setdefault(key, made)
    x = x.detach().contiguous().as_strided(x.shape, (x.shape[1], 1))  # one row has one stride, too
    if bucket[0] > 1:
        torch._dynamo.mark_dynamic(x, 0, min=bucket[0], max=bucket[1])
        if adapter_ids is not None:
            adapter_ids = adapter_ids.contiguous().view(adapter_ids.shape)
            torch._dynamo.mark_dynamic(adapter_ids, 0, min=bucket[0], max=bucket[1])
    return graph(x, weight, slices, adapter_ids, bias)


def _described(operand: Tensor | None) -> tuple[Hashable, ...]:
    """Return what a graph is specialised on of an operand whose number of rows is not."""
    if operand is None:
        return ()
    return operand.dtype, operand.shape[1:], operand.is_inference()


def _own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same function with a code object of its own."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
