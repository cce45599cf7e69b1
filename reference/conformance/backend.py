"""A backend, an object with some of the reference's functions, and the way it is called.

Every call is watched: writing to an operand is found, and before the call memory of the size of the
result is filled with NaN and freed, so that outputs that are never written show.

Source: ``docs/conformance.md``, "A backend".
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import Float4Weight, LoRAStack, PackedWeight, dequantize
from int4_lora.reference.conformance.cases.operands import Operands, tensors_of
from int4_lora.reference.conformance.judging.verdict import Finding
from int4_lora.reference.conformance.manifest import FUNCTIONS, Manifest

__all__ = ["Backend", "Prepared"]

POISONED = range(8)  # blocks: a backend's intermediate tensors use some up
LARGEST_WATCHED = 2**28  # bytes
LARGEST_REMEMBERED = 2**12  # tokens


class Backend:
    """An object under test.

    Args:
        under_test: has one or more of ``FUNCTIONS`` as attributes, and optionally ``prepare``,
            ``prepare_lora``, ``prepare_experts``, ``prepare_experts_lora``, ``manifest``,
            ``declared`` and ``declared_experts``.
        name: its name in reports.

    Raises:
        TypeError: it has none of the functions, or one is not callable.
        ValueError: its manifest has an unknown claim.

    Example:
        >>> import int4_lora.reference
        >>> Backend(int4_lora.reference, "reference").functions[0]
        'pack'
    """

    def __init__(self, under_test: object, name: str) -> None:
        self.name = name
        self.under_test = under_test
        available = {f for f in FUNCTIONS if _function(under_test, f) is not None}
        if "int4_lora_linear" in available:
            available.add("int4_linear")  # the same without adapters
        self.functions = tuple(f for f in FUNCTIONS if f in available)
        if not self.functions:
            raise TypeError(f"{name} has none of the functions {', '.join(FUNCTIONS)}")
        claims = getattr(under_test, "manifest", None)
        self.manifest = Manifest.of(None if isinstance(claims, types.ModuleType) else claims)
        self._past_ids: dict[int, list[Tensor]] = {}  # by number of tokens

    def skips(self, function: str, operands: Operands, device: str) -> str | None:
        """Return why the backend does not claim a call, or None.

        Args:
            function: the function.
            operands: its arguments.
            device: the device they would be moved to.
        """
        if function not in self.functions:
            return f"no {function}"
        devices = self.manifest.devices
        if devices is not None and torch.device(device).type not in devices:
            return f"device {device}"
        return self.manifest.why_not(operands)

    def declared(self, operands: Operands, prepared: Prepared) -> Manifest:
        """Return the manifest, with the roundings that ``declared`` returns for a call."""
        of_experts = operands.experts is not None
        declared = _function(self.under_test, "declared_experts" if of_experts else "declared")
        if declared is None or operands.x is None or (operands.weight is None and not of_experts):
            return self.manifest
        with _watched(operands):
            claims = declared(operands.x, prepared.weight, prepared.lora)
        return Manifest.of({**vars(self.manifest), **claims})

    def prepare(self, operands: Operands) -> Prepared:
        """Return the weight and the adapters as the backend wants them.

        Raises:
            Modified: an operand was written to.
        """
        with _watched(operands):
            if operands.experts is not None:
                return Prepared(
                    self._prepared("prepare_experts", operands.experts),
                    self._prepared("prepare_experts_lora", operands.experts_lora),
                )
            return Prepared(
                self._prepared("prepare", operands.weight),
                self._prepared("prepare_lora", operands.lora),
            )

    def with_adapters(self, prepared: Prepared, operands: Operands) -> Prepared:
        """Return a prepared weight with the prepared adapters of other operands."""
        with _watched(operands):
            return Prepared(prepared.weight, self._prepared("prepare_lora", operands.lora))

    def call(self, function: str, operands: Operands, prepared: Prepared | None = None) -> Any:
        """Call a function once and return its result, a weight as the dense weight it holds.

        Args:
            function: the function.
            operands: its arguments.
            prepared: what ``prepare`` returned for this weight and these adapters, or None to
                prepare them now.

        Raises:
            Modified: an operand was written to.
        """
        prepared = prepared or self.prepare(operands)
        called, arguments = self._called(function, _arguments(function, operands, prepared))
        options: dict[str, Any] = {"dim": operands.dim} if operands.dim != 1 else {}
        if not operands.zero_plus_one:
            options["zero_plus_one"] = False
        if operands.activation != "silu":
            options["activation"] = operands.activation
        if operands.weights_first:
            options["weights_first"] = True
        self._remember(operands.adapter_ids)
        with _watched(operands):
            _poison(operands)
            result = called(*arguments, **options)
        return dequantize(result) if isinstance(result, (PackedWeight, Float4Weight)) else result

    def past_ids(self, operands: Operands) -> tuple[Tensor, ...]:
        """Return the different adapter ids of earlier calls with as many tokens, latest first."""
        ids = operands.adapter_ids
        return () if ids is None else tuple(reversed(self._past_ids.get(len(ids), [])))

    def _remember(self, ids: Tensor | None) -> None:
        if ids is None or len(ids) > LARGEST_REMEMBERED:
            return
        known = self._past_ids.setdefault(len(ids), [])
        ids = ids.detach().to("cpu", torch.int64, copy=True)
        self._past_ids[len(ids)] = [each for each in known if not torch.equal(each, ids)] + [ids]

    def _called(
        self, function: str, arguments: tuple[object, ...]
    ) -> tuple[Callable[..., Any], tuple[object, ...]]:
        """Return the function to call; int4_lora_linear stands in for a missing int4_linear."""
        called = _function(self.under_test, function)
        if called is None and function == "int4_linear":
            called = _function(self.under_test, "int4_lora_linear")
            x, weight, *bias = arguments
            arguments = (x, weight, None, None, *bias) if bias else (x, weight)
        if called is None:
            raise TypeError(f"{self.name} has no {function}")
        return called, arguments

    def _prepared(self, name: str, operand: object) -> object:
        if isinstance(operand, list):  # of slices: the backend may change the list it gets
            operand = list(operand)
        prepare = _function(self.under_test, name)
        return operand if prepare is None or operand is None else prepare(operand)


@contextmanager
def _watched(operands: Operands) -> Iterator[None]:
    """Raise ``Modified`` if an operand is written to inside the context."""
    watched = {
        name: tensor
        for name, tensor in tensors_of(operands).items()
        if tensor.nbytes <= LARGEST_WATCHED
    }
    before = {name: tensor.clone() for name, tensor in watched.items()}
    yield
    for name, tensor in watched.items():
        if not torch.equal(_bytes(tensor), _bytes(before[name])):
            raise Modified(name)


class Prepared:
    """A weight and adapters as a backend wants them.

    Args:
        weight: the result of its ``prepare``; without one, the weight.
        lora: the result of its ``prepare_lora``; without one, the adapters.
    """

    def __init__(self, weight: object, lora: object) -> None:
        self.weight = weight
        self.lora = lora


class Modified(Exception):
    """A backend wrote to an operand.

    Args:
        name: the operand's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"wrote to its operand {name}")

    def finding(self) -> Finding:
        """Return this error as a finding."""
        return Finding("modified", str(self))


def _function(under_test: object, name: str) -> Callable[..., Any] | None:
    function = getattr(under_test, name, None)
    if function is None or isinstance(function, types.ModuleType):
        return None
    if not callable(function):
        raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def _arguments(function: str, operands: Operands, prepared: Prepared) -> tuple[object, ...]:
    """Return the positional arguments, without trailing ones that are None."""
    stack = operands.lora if isinstance(operands.lora, LoRAStack) else None
    every: dict[str, tuple[object, ...]] = {
        "pack": (operands.codes,),
        "unpack": (operands.packed, operands.size),
        "dequantize": (operands.weight, operands.dtype),
        "from_gptq": operands.layout or (),
        "from_awq": operands.layout or (),
        "shrink": (operands.x, stack, operands.adapter_ids),
        "expand": (operands.h, stack, operands.adapter_ids),
        "int4_linear": (operands.x, prepared.weight, operands.bias),
        "int4_lora_linear": (
            operands.x,
            prepared.weight,
            prepared.lora,
            operands.adapter_ids,
            operands.bias,
        ),
        "int4_moe": (
            operands.x,
            prepared.weight,
            operands.topk_ids,
            operands.topk_weights,
            prepared.lora,
            operands.adapter_ids,
        ),
    }
    arguments = every[function]
    while arguments and arguments[-1] is None:
        arguments = arguments[:-1]
    return arguments


def _poison(operands: Operands) -> None:
    """Leave freed blocks full of NaN where the result is likely to be allocated."""
    value = operands.x if operands.h is None else operands.h
    if value is None:
        return
    widths = [part.stack.rank for part in operands.slices]
    widths += [part.stop for part in operands.slices]
    widths += [] if operands.weight is None else [operands.weight.out_features]
    widths += [] if operands.experts is None else [operands.experts.hidden, operands.experts.inter]
    for width in widths:
        for bytes_each in {value.element_size(), 4}:
            size = value.shape[0] * width * bytes_each
            if 0 < size <= LARGEST_WATCHED:
                blocks = [
                    torch.full((size,), 0xFF, dtype=torch.uint8, device=value.device)
                    for _ in POISONED
                ]
                del blocks


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
