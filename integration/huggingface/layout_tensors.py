"""A prepared weight as named tensors, which a module holds as buffers, and back.

The names are those of the layout's fields, behind a prefix of their own. ``moved`` moves such a
tensor as ``Module.to`` moves a buffer, but never casts it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from int4_lora.compiled import PreparedWeight
from int4_lora.reference import Float4Weight, PackedWeight

__all__ = ["moved", "named_tensors", "with_tensors"]

PREFIX = "int4_"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by a float's bytes
Holder = TypeVar("Holder", bound=PreparedWeight | PackedWeight | Float4Weight)


def named_tensors(weight: PreparedWeight | PackedWeight | Float4Weight) -> dict[str, Tensor]:
    """Return the tensors of a layout by name.

    Example:
        >>> import torch
        >>> from int4_lora.compiled import prepare
        >>> from int4_lora.reference import quantize
        >>> list(named_tensors(prepare(quantize(torch.ones(2, 6), group_size=3))))
        ['int4_packed', 'int4_scale']
    """
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(weight):  # type: ignore[arg-type]
        value = getattr(weight, field.name)
        if isinstance(value, Tensor):
            found[PREFIX + field.name] = value
        elif isinstance(value, (PackedWeight, Float4Weight)):
            found |= named_tensors(value)
    return found


def with_tensors(weight: Holder, tensors: Mapping[str, Tensor]) -> Holder:
    """Return the same weight with other tensors, by the names of ``named_tensors``."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(weight):  # type: ignore[arg-type]
        value = getattr(weight, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = tensors[PREFIX + field.name]
        elif isinstance(value, (PackedWeight, Float4Weight)):
            changes[field.name] = with_tensors(value, tensors)
    changed: Any = dataclasses.replace(weight, **changes)  # type: ignore[type-var]
    if isinstance(weight, PackedWeight):  # a meta tensor does not say whether it holds a -1
        object.__setattr__(changed, "column_order", weight.column_order)
    return cast(Holder, changed)


def moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return ``fn(tensor)`` in the dtype of the tensor, with the same bits.

    Args:
        fn: what ``Module._apply`` is given: it moves a tensor, casts it, or both.
        tensor: a tensor of a layout.
    """
    plain = tensor.view(INTEGERS[tensor.element_size()]) if tensor.is_floating_point() else tensor
    result = fn(plain)
    if result is plain:
        return tensor
    if result.dtype != plain.dtype:  # Module.type() casts integers, too
        result = plain.to(result.device)
    return result.view(tensor.dtype)
