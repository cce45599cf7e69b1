"""A backend: an object with some of the contract's functions, and how it is called.

Every call is watched: operands that were written to are found, and memory of the size of the
result is filled with NaN and freed before, so that what is not written shows.

Source: the public contract of ``int4_lora.reference``.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import LoRAStack
from int4_lora.reference.conformance.manifest import FUNCTIONS, Manifest
from int4_lora.reference.conformance.operands import Operands, tensors_of
from int4_lora.reference.conformance.verdict import Finding

__all__ = ["Backend", "Prepared"]

POISONED = range(8)  # blocks: some are taken for what a backend computes on the way
LARGEST_WATCHED = 2**28  # bytes


class Backend:
    """An object under test.

    Args:
        under_test: has one or more of the contract's functions as attributes, and optionally
            ``prepare``, ``prepare_lora``, ``manifest`` and ``declared``.
        name: what reports call it.

    Raises:
        TypeError: none of the functions is there, or one is not callable.
        ValueError: a manifest that claims what there is none of.

    Example:
        >>> import int4_lora.reference
        >>> Backend(int4_lora.reference, "reference").functions[0]
        'pack'
    """

    def __init__(self, under_test: object, name: str) -> None:
        self.name = name
        self.under_test = under_test
        self.functions = tuple(one for one in FUNCTIONS if _function(under_test, one) is not None)
        if not self.functions:
            raise TypeError(f"{name} has none of the functions {', '.join(FUNCTIONS)}")
        claims = getattr(under_test, "manifest", None)
        self.manifest = Manifest.of(None if isinstance(claims, types.ModuleType) else claims)

    def skips(self, function: str, operands: Operands, device: str) -> str | None:
        """Return why the backend is not asked, or None.

        Args:
            function: which function would be called.
            operands: its arguments.
            device: where they would be.
        """
        if function not in self.functions:
            return f"no {function}"
        if torch.device(device).type not in self.manifest.devices:
            return f"device {device}"
        return self.manifest.why_not(operands)

    def declared(self, operands: Operands, prepared: Prepared) -> Manifest:
        """Return the roundings declared for a call: the manifest's, or those of ``declared``."""
        declared = _function(self.under_test, "declared")
        if declared is None or operands.weight is None or operands.x is None:
            return self.manifest
        own = declared(operands.x, prepared.weight, prepared.lora)
        return Manifest.of({**vars(self.manifest), **own})

    def prepare(self, operands: Operands) -> Prepared:
        """Return the operands as the backend wants them, prepared once."""
        weight, lora = operands.weight, operands.lora
        of_weight = _function(self.under_test, "prepare")
        of_lora = _function(self.under_test, "prepare_lora")
        if of_weight is not None and weight is not None:
            weight = of_weight(weight)
        if of_lora is not None and lora is not None:
            lora = of_lora(lora)
        return Prepared(weight, lora)

    def call(self, function: str, operands: Operands, prepared: Prepared | None = None) -> Any:
        """Call a function once and return what it returned.

        Args:
            function: which.
            operands: its arguments.
            prepared: what ``prepare`` returned for this weight and these adapters, or None to
                prepare them now.

        Raises:
            Modified: an operand was written to.
        """
        own = prepared or self.prepare(operands)
        called = _function(self.under_test, function)
        if called is None:
            raise TypeError(f"{self.name} has no {function}")
        watched = {
            name: tensor
            for name, tensor in tensors_of(operands).items()
            if tensor.nbytes <= LARGEST_WATCHED
        }
        before = {name: tensor.clone() for name, tensor in watched.items()}
        _poison(function, operands)
        options = {"dim": operands.dim} if operands.dim != 1 else {}
        result = called(*_arguments(function, operands, own), **options)
        for name, tensor in watched.items():
            if not torch.equal(_bytes(tensor), _bytes(before[name])):
                raise Modified(name)
        return result


class Prepared:
    """A weight and adapters as a backend wants them.

    Args:
        weight: what its ``prepare`` returned, or the weight.
        lora: what its ``prepare_lora`` returned, or the adapters.
    """

    def __init__(self, weight: object, lora: object) -> None:
        self.weight = weight
        self.lora = lora


class Modified(Exception):
    """A backend wrote to an operand.

    Args:
        name: which.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"wrote to its operand {name}")

    def finding(self) -> Finding:
        """Return it as a finding."""
        return Finding("modified", str(self))


def _function(under_test: object, name: str) -> Callable[..., Any] | None:
    found = getattr(under_test, name, None)
    if found is None or isinstance(found, types.ModuleType):
        return None
    if not callable(found):
        raise TypeError(f"{name} must be a function, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _arguments(function: str, operands: Operands, own: Prepared) -> tuple[object, ...]:
    """Return the positional arguments, without the last ones that are None."""
    stack = operands.lora if isinstance(operands.lora, LoRAStack) else None
    every: dict[str, tuple[object, ...]] = {
        "pack": (operands.codes,),
        "unpack": (operands.packed, operands.size),
        "dequantize": (operands.weight, operands.dtype),
        "shrink": (operands.x, stack, operands.adapter_ids),
        "expand": (operands.h, stack, operands.adapter_ids),
        "int4_linear": (operands.x, own.weight, operands.bias),
        "int4_lora_linear": (
            operands.x,
            own.weight,
            own.lora,
            operands.adapter_ids,
            operands.bias,
        ),
    }
    arguments = every[function]
    while arguments and arguments[-1] is None:
        arguments = arguments[:-1]
    return arguments


def _poison(function: str, operands: Operands) -> None:
    """Leave freed blocks full of NaN where the result will probably be allocated."""
    x, weight = operands.x, operands.weight
    if x is None or weight is None or function not in ("int4_linear", "int4_lora_linear"):
        return
    size = x.shape[0] * weight.out_features * x.element_size()
    if 0 < size <= LARGEST_WATCHED:
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=x.device) for _ in POISONED]
        del blocks


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
