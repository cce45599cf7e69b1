"""Check operands outside the graphs: types, dtypes, shapes and devices, never values.

A check of values would break a graph and wait for a GPU.
"""

from __future__ import annotations

from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedLoRA, PreparedSlice
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference import Float4Weight, LoRASlice, LoRAStack, PackedWeight
from int4_lora.reference.checks import (
    ID_DTYPES,
    X_DTYPES,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.lora import check_accumulates
from int4_lora.reference.lora_stack import check_slices_fit

__all__ = ["check_operands", "check_slices"]


def check_operands(
    x: Tensor,
    weight: PreparedWeight,
    lora: PreparedLoRA | None,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> tuple[PreparedSlice, ...]:
    """Check all operands of a layer and return the slices of the adapters.

    Raises:
        TypeError: an operand has the wrong type or dtype.
        ValueError: an operand has the wrong shape or device.
    """
    if lora is None and adapter_ids is None and bias is None and _fit(x, weight):
        return ()
    if not isinstance(weight, PreparedWeight):
        advice = ": call prepare()" if isinstance(weight, (PackedWeight, Float4Weight)) else ""
        raise TypeError(f"weight must be a PreparedWeight, got {type(weight).__name__}{advice}")
    slices: tuple[PreparedSlice, ...] = ()
    if lora is not None:
        slices = check_slices(lora, "weight", weight.in_features, weight.out_features)
    check_dtype("x", x, X_DTYPES)
    check_shape("x", x, (None, weight.in_features), "[tokens, in_features]")
    for part in slices:
        check_accumulates("a and b of lora", part.a, x)
        check_one_device(x=x, lora=part.a)
    if bias is not None:
        check_dtype("bias", bias, X_DTYPES)
        check_shape("bias", bias, (weight.out_features,), "[out_features]")
        check_accumulates("bias", bias, x)
    if adapter_ids is not None:
        check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
        check_shape("adapter_ids", adapter_ids, (x.shape[0],), "[tokens]")
    elif slices:
        raise ValueError("adapter_ids must be given with lora, got None")
    check_one_device(x=x, adapter_ids=adapter_ids, bias=bias)
    if weight.device != x.device:
        raise ValueError(
            f"all operands must be on one device: x is on {x.device}, weight is on {weight.device}"
        )
    return slices


def _fit(x: Tensor, weight: PreparedWeight) -> bool:
    """Return whether x and weight alone pass all checks, at the cost of a few comparisons."""
    return (
        isinstance(weight, PreparedWeight)
        and isinstance(x, Tensor)
        and x.dtype in X_DTYPES
        and x.ndim == 2
        and x.shape[1] == weight.shape[1]
        and x.device == weight.device
    )


def check_slices(
    lora: PreparedLoRA, base: str, in_features: int, out_features: int
) -> tuple[PreparedSlice, ...]:
    """Check that adapters fit a layer and return their slices.

    Args:
        lora: the adapters.
        base: the name of the layer in messages.
        in_features: the layer's input features.
        out_features: the layer's output features.

    Raises:
        TypeError: ``lora`` is not a PreparedLoRA.
        ValueError: slices do not fit the layer, or overlap.
    """
    if not isinstance(lora, PreparedLoRA):
        found = type(lora).__name__
        raw = isinstance(lora, (LoRAStack, LoRASlice, list, tuple))
        advice = ": call prepare_lora()" if raw else ""
        raise TypeError(f"lora must be a PreparedLoRA, got {found}{advice}")
    placed = [(part.a, part.start, part.stop) for part in lora.slices]
    check_slices_fit(placed, in_features, out_features, base)
    return lora.slices
