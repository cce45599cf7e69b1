"""Cache compiled graphs by keys, each of which describes everything that its graph depends on.

torch counts recompiles per code object, so every graph gets a code object of its own. Forty layer
shapes in one process are then forty graphs, not forty recompiles of one graph, and no shape makes
the sizes of another dynamic.

Dynamo's guards on plain operands are left out: the key checks the same at less cost. Once compiled,
a graph is called without Dynamo, whose guards and wrappers take 0.3 ms with cold processor caches,
as they are between the layers of a model; an adapter's sums for 8 tokens take 0.1 ms. The function
that the backend returned is called with the graph's inputs. Those are identified by object
identity among the example inputs that every backend receives; so are the results of the first call.

Source: ``torch._dynamo``'s documentation of ``recompile_limit``, ``mark_dynamic`` and custom
backends; ``torch._dynamo.pgo``.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from int4_lora.compiled.adapters.terms import GATHERED_TOKENS
from int4_lora.compiled.products import BATCHED_TOKENS, SLOW_ON_CPU

__all__ = [
    "Graph",
    "add_graph",
    "bucket_of",
    "compile_graph",
    "forget_graph",
    "graph_key",
    "graph_of",
    "in_rows",
    "is_plain",
    "known_graphs",
    "marked",
    "state_of",
]

MOST_TOKENS = 2**31 - 1
_BATCHED = () if torch.bfloat16 in SLOW_ON_CPU else (BATCHED_TOKENS,)
LAST_TOKENS = {  # the ends of buckets: within a bucket, ``add_terms`` must not change its choice
    "cpu": (1, GATHERED_TOKENS["cpu"][0], *_BATCHED, 2**15),
    # a block of ``split_k`` holds 16 tokens, or 64; kernels index 2^13 rows in 32 bits
    "cuda": (1, 16, GATHERED_TOKENS["cuda"][0], 2**13),
}
_C: Any = torch._C
_GUARDS_CAN_GO = hasattr(torch.compiler, "keep_tensor_guards_unsafe")  # torch 2.8 and later


@dataclass(frozen=True)
class Graph:
    """A compiled function of per-token operands, such as x, and of other operands.

    It returns one tensor, or a tuple of tensors.

    Args:
        guarded: returned by torch.compile; it checks guards and recompiles where they fail.
        direct: returned by the backend; it takes the graph's inputs and returns a sequence of all
            results. None where guards are needed.
        places: the index of each input of the graph in (number of tokens, *operands' tensors).
    """

    guarded: Callable[..., Any]
    direct: Callable[..., Sequence[Tensor]] | None = None
    places: tuple[int, ...] = ()


@dataclass(eq=False)
class _Watched:
    """A function returned by a backend, whose first results are kept until ``gave``.

    Args:
        function: takes a graph's inputs and returns a sequence of its results.
        first: the results of the first call; None before it and after ``gave``.
        watching: whether the first call is still to come.
    """

    function: Callable[..., Sequence[Tensor]]
    first: Sequence[Tensor] | None = None
    watching: bool = True

    def __call__(self, *inputs: Any) -> Sequence[Tensor]:
        results = self.function(*inputs)
        if self.watching:
            self.first, self.watching = results, False
        return results

    def gave(self, returned: Any) -> bool:
        """Return whether the first results are what the whole function returned; forget them."""
        first, self.first = self.first, None
        whole = returned if isinstance(returned, tuple) else (returned,)
        return (
            first is not None
            and len(first) == len(whole)
            and all(mine is other for mine, other in zip(first, whole, strict=True))
        )


_graphs: dict[Hashable, Graph] = {}
_lock = threading.RLock()


def graph_of(key: Hashable) -> Graph | None:
    """Return the graph of a key, or None if it is not compiled yet."""
    return _graphs.get(key)


def known_graphs() -> dict[Hashable, Graph]:
    """Return the graphs of this process by key."""
    return dict(_graphs)


def add_graph(key: Hashable, graph: Graph) -> None:
    """Take a graph that another process compiled, unless its key has a graph here."""
    _graphs.setdefault(key, graph)


def forget_graph(key: Hashable) -> None:
    """Forget the graph of a key, so that the next call compiles it."""
    _graphs.pop(key, None)


def bucket_of(tokens: int, device: str = "cpu") -> tuple[int, int]:
    """Return the first and the last number of tokens of the bucket that holds ``tokens``.

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


def graph_key(
    kind: Hashable,
    bucket: tuple[int, int],
    slices: Hashable,
    tensors: Sequence[Tensor],
    *operands: Tensor | None,
) -> Hashable:
    """Return the key of a graph: equal keys mean that one graph serves both.

    Args:
        kind: the function that is compiled, and the layout of its weight.
        bucket: the first and the last number of tokens that the graph serves.
        slices: what the graph depends on in the adapters' slices.
        tensors: the fixed tensors: the adapters' and the weight's.
        operands: the other operands of a call, the first of which is not None.
    """
    first, *others = operands
    assert first is not None
    return kind, bucket, slices, _sharing(tensors), state_of(first, *others)


def _sharing(tensors: Sequence[Tensor]) -> Hashable:
    """Return which tensors are the same object: their graph has fewer inputs."""
    identities = list(map(id, tensors))
    if len(set(identities)) == len(identities):
        return None
    return tuple(identities.index(identity) for identity in identities)


def state_of(first: Tensor, *others: Tensor | None) -> tuple[Hashable, ...]:
    """Return what a graph depends on in the operands and in torch's settings and modes.

    Shapes are left out. So are strides and negative bits, which ``in_rows`` normalises.
    """
    device = first.device
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.compiler.is_compiling(),
        _C._len_torch_function_stack(),
        _C._len_torch_dispatch_stack(),
        _C._functorch.peek_interpreter_stack() is not None,  # within vmap and the like
        getattr(forward_ad, "_current_level", -1),
        # the cheap test comes first: device.type costs more than everything else here
        _C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type),
        first.dtype,
        device,
        type(first),
        first.is_inference(),
        *[
            None
            if operand is None
            else (operand.dtype, operand.device, type(operand), operand.is_inference())
            for operand in others
        ],
    )


def in_rows(operand: Tensor | None) -> Tensor | None:
    """Return an operand as graphs expect it: contiguous and without a negative bit."""
    if operand is None or (operand.is_contiguous() and not operand.is_neg()):
        return operand
    return operand.detach().resolve_neg().contiguous()


def marked(operand: Tensor | None, bucket: tuple[int, int]) -> Tensor | None:
    """Return a per-token operand for Dynamo, its number of rows marked as any of a bucket.

    The last bucket is marked without an end: kernels on a GPU index in 32 bits up to some number of
    tokens, and no graph can be compiled for a range beyond that number.
    """
    if operand is None:
        return None
    strides = (operand.shape[1], 1) if operand.ndim == 2 else (1,)  # also if there is one row
    operand = operand.detach().resolve_neg().contiguous().as_strided(operand.shape, strides)
    if bucket[1] == MOST_TOKENS:
        torch._dynamo.mark_dynamic(operand, 0)
    elif bucket[0] > 1:
        torch._dynamo.mark_dynamic(operand, 0, min=bucket[0], max=bucket[1])
    return operand


def compile_graph(
    key: Hashable,
    bucket: tuple[int, int],
    function: Callable[..., Any],
    backend: Any,
    operands: Sequence[Any],
    tensors: Sequence[Tensor | None],
) -> Graph:
    """Return the graph of a key; compile it unless another thread was first.

    Args:
        key: describes everything that the graph depends on.
        bucket: the first and the last number of tokens that the graph serves.
        function: takes ``operands`` and returns one tensor or a tuple of tensors.
        backend: "inductor", or a callable, as torch.compile takes it.
        operands: the operands to compile with; the first has a row for each token.
        tensors: the tensors among the operands and inside them, in the order of ``places``.
    """
    plain = is_plain(operands)
    bounded = bucket[1] < MOST_TOKENS  # else only guards know the upper end
    under_modes = _C._len_torch_function_stack() + _C._len_torch_dispatch_stack() > 0
    calls: list[tuple[_Watched, tuple[int, ...]]] = []

    def noting(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        places = _places(graph, examples, tensors, bucket)
        if backend == "inductor":
            compiled = importlib.import_module("torch._inductor.compile_fx").compile_fx(
                graph, examples
            )
        else:
            compiled = backend(graph, examples)
        calls.append((_Watched(compiled), places))
        return calls[-1][0]

    with _lock:
        known = _graphs.get(key)
        if known is not None:
            return known
        guarded: Callable[..., Any] = torch.compile(
            _own_code(_bounded(bucket, function), key),
            fullgraph=plain,
            backend=noting if plain and bounded and not under_modes else backend,
            options={"guard_filter_fn": _kept_guards} if plain and _GUARDS_CAN_GO else None,
        )
        results = guarded(*operands)
        direct: Callable[..., Sequence[Tensor]] | None = None
        places: tuple[int, ...] = ()
        if len(calls) == 1 and calls[0][0].gave(results) and calls[0][1]:
            direct, places = calls[0][0].function, calls[0][1]
        return _graphs.setdefault(key, Graph(guarded, direct, places))


def is_plain(operands: Sequence[Any]) -> bool:
    """Return whether the key describes the operands fully: no tensor subclasses, no transforms."""
    return (
        all(
            type(operand) in (Tensor, torch.nn.Parameter)
            for operand in operands
            if isinstance(operand, Tensor)
        )
        and _C._functorch.peek_interpreter_stack() is None
    )


def _places(
    graph: torch.fx.GraphModule,
    examples: Sequence[Any],
    tensors: Sequence[Tensor | None],
    bucket: tuple[int, int],
) -> tuple[int, ...]:
    """Return the index of each input of a graph in (tokens, *tensors); () if one is unknown.

    An input that is a size is the number of tokens, of x or of the ids: no other size is dynamic in
    the first graph of a code object. The example's value of that size is checked to confirm it.
    """
    tokens = tensors[0].shape[0] if tensors[0] is not None else None
    places: list[int] = []
    for example in examples:
        if isinstance(example, torch.SymInt):
            known = bucket[0] < bucket[1] and example.node.hint == tokens
            places += [0] if known else []
        else:
            places += [at for at, tensor in enumerate(tensors, 1) if tensor is example][:1]
    return tuple(places) if len(places) == len(examples) else ()


def _bounded(bucket: tuple[int, int], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with the bucket written into its graph.

    Torch stores graphs on disk with the range of tokens that they were compiled for, and looks them
    up by their content. If another version of this package had other buckets, torch would load one
    of its graphs, which fails outside of that graph's range.
    """

    def bounded(*operands: Any) -> Any:
        tokens = operands[0].shape[0]
        torch._check(tokens >= bucket[0])  # type: ignore[no-untyped-call]
        torch._check(tokens <= bucket[1])  # type: ignore[no-untyped-call]
        return function(*operands)

    return bounded


def _kept_guards(guards: Sequence[Any]) -> list[bool]:
    """Return which guards to keep: those on no operand, such as torch's settings and modes."""
    return [not guard.name for guard in guards]


def _own_code(function: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
    """Return the same function with a code object and a name of its own.

    Dynamo remembers by file, line and name which sizes have changed, in some set-ups across
    processes. Under a shared name, all sizes of a second layer would become symbolic: that yields
    other kernels, which take minutes to compile.
    """
    assert isinstance(function, FunctionType)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    copy = FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{digest}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
