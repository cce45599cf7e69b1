"""Compiled graphs entered without Dynamo, once Dynamo has made them.

An entry through ``torch.compile`` checks guards and passes wrappers: 0.3 ms with cold processor
caches, as they are between the layers of a model, where an adapter's sums for 8 tokens take 0.1.
A graph's key (``graphs``) tells all that its guards on operands would, and the range that its
number of tokens was given leaves no room for others. So what the backend returned is called with
the graph's inputs, as long as torch's modes are those it was made in; else Dynamo is asked.

Source: ``OutputGraph.compile_and_call_fx_graph`` of ``torch/_dynamo/output_graph.py``, which makes
the same call.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Hashable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor

__all__ = ["DirectEntry", "is_transformed", "modes"]

INDUCTOR = "torch._inductor.compile_fx"


class DirectEntry:
    """A function that ``torch.compile`` compiles at its first call.

    Args:
        function: takes ``*operands`` and returns one tensor.
        backend: what compiles it; "inductor", or a callable.
        options: further arguments of ``torch.compile``.
    """

    def __init__(
        self, function: Callable[..., Tensor], backend: Any, options: dict[str, Any] | None
    ) -> None:
        self._backend = backend
        self._lock = threading.RLock()
        self._made: tuple[Any, CodeType | None] | None = None
        self._entry: tuple[Any, CodeType | None, Hashable] = (None, None, None)
        self._compiled = torch.compile(
            function, fullgraph=True, backend=self._noting, options=options
        )

    def __call__(self, *operands: Any) -> Tensor:
        """Return what the function returns."""
        found = self.direct(operands)
        if found is not None:
            graph, inputs = found
            return graph(*inputs)[0]
        with self._lock:
            before = modes()
            y: Tensor = self._compiled(*operands)
            if self._made is not None:  # just now, else it was one that Dynamo had
                self._entry, self._made = (*self._made, before), None
        return y

    def direct(
        self, operands: Sequence[Any]
    ) -> tuple[Callable[..., Sequence[Tensor]], tuple[Any, ...]] | None:
        """Return the graph and its inputs, or None where Dynamo has to be asked.

        Args:
            operands: of the function.
        """
        graph, inputs, made_in = self._entry  # at once: another thread may compile
        if inputs is None or modes() != made_in:
            return None
        return graph, eval(inputs, {"L": {"operands": operands}})

    def _noting(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        """Compile a graph, and note how it is called."""
        inputs = _inputs_of(graph)  # the compiler takes the notes of Dynamo away
        backend = self._backend
        if backend == "inductor":
            backend = importlib.import_module(INDUCTOR).compile_fx
        compiled = backend(graph, examples)
        self._made = (compiled, inputs)
        return compiled


def modes() -> Hashable:
    """Return what of torch's state a graph is made for beside its operands."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch._C._len_torch_function_stack(),  # pyright: ignore[reportAttributeAccessIssue]
        torch._C._len_torch_dispatch_stack(),
        torch.compiler.is_compiling(),
        is_transformed(),
        getattr(torch.autograd.forward_ad, "_current_level", -1),
    )


def is_transformed() -> bool:
    """Return whether this is within torch.func's transforms, whose tensors say nothing of it."""
    stack = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return stack.peek_interpreter_stack() is not None


def _inputs_of(graph: torch.fx.GraphModule) -> CodeType | None:
    """Return the code of a tuple of a graph's inputs, or None where they cannot be told.

    Dynamo names an input as an expression of the function's arguments, ``L['operands'][0]``.
    """
    try:
        names = []
        for node in graph.graph.find_nodes(op="placeholder"):
            name = node.meta["grapharg"].source.name
            names.append(name() if callable(name) else name)
        (output,) = graph.graph.find_nodes(op="output")
    except (AttributeError, KeyError, ValueError):
        return None
    named = all(isinstance(one, str) and one.startswith("L['operands']") for one in names)
    if not named or len(output.args[0]) != 1:
        return None
    return compile("".join(["(", *(f"{one}, " for one in names), ")"]), "<inputs>", "eval")
