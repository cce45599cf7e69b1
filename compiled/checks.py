"""Checks at the compiled path's door: types, dtypes and shapes, never values.

A check of values would need the numbers: it breaks a graph, and waits for a GPU.

Source: the contract of ``int4_lora.compiled``.
"""

from __future__ import annotations

from itertools import combinations

from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedLoRA, PreparedSlice
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight
from int4_lora.reference.checks import ID_DTYPES, X_DTYPES, check_dtype, check_shape
from int4_lora.reference.lora import check_accumulates

__all__ = ["check_operands", "check_slices"]


def check_operands(
    x: Tensor,
    weight: PreparedWeight,
    lora: PreparedLoRA | None,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> tuple[PreparedSlice, ...]:
    """Check all operands; return the slices of the adapters.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape or device does not fit.
    """
    if lora is None and adapter_ids is None and bias is None and _plainly_fits(x, weight):
        return ()
    slices = _slices(weight, lora)
    check_dtype("x", x, X_DTYPES)
    check_shape("x", x, (None, weight.in_features), "[tokens, in_features]")
    devices = {"x": x.device, "weight": weight.device}
    for part in slices:
        check_accumulates("a and b of lora", part.a, x)
        devices["lora"] = part.a.device
    if bias is not None:
        check_dtype("bias", bias, X_DTYPES)
        check_shape("bias", bias, (weight.out_features,), "[out_features]")
        check_accumulates("bias", bias, x)
        devices["bias"] = bias.device
    if adapter_ids is not None:
        check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
        check_shape("adapter_ids", adapter_ids, (x.shape[0],), "[tokens]")
        devices["adapter_ids"] = adapter_ids.device
    elif slices:
        raise ValueError("adapter_ids must be given with lora, got None")
    if any(device != x.device for device in devices.values()):
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all operands must be on one device, got {found}")
    return slices


def _plainly_fits(x: Tensor, weight: PreparedWeight) -> bool:
    """Return whether x and weight alone are right, at the cost of a few comparisons."""
    return (
        isinstance(weight, PreparedWeight)
        and isinstance(x, Tensor)
        and x.dtype in X_DTYPES
        and x.ndim == 2
        and x.shape[1] == weight.shape[1]
        and x.device == weight.device
    )


def _slices(weight: PreparedWeight, lora: PreparedLoRA | None) -> tuple[PreparedSlice, ...]:
    if isinstance(weight, PackedWeight):
        raise TypeError("weight must be a PreparedWeight, got PackedWeight: call prepare()")
    if not isinstance(weight, PreparedWeight):
        raise TypeError(f"weight must be a PreparedWeight, got {type(weight).__name__}")
    if lora is None:
        return ()
    return check_slices(lora, "weight", weight.in_features, weight.out_features)


def check_slices(
    lora: PreparedLoRA, base: str, in_features: int, out_features: int
) -> tuple[PreparedSlice, ...]:
    """Check that adapters fit a layer; return their slices.

    Args:
        lora: the adapters.
        base: what the message calls what they are added to.
        in_features: of the layer.
        out_features: of the layer.

    Raises:
        TypeError: no adapters that were prepared.
        ValueError: slices that do not fit the layer, or overlap.
    """
    if isinstance(lora, (LoRAStack, LoRASlice, list, tuple)):
        found = type(lora).__name__
        raise TypeError(f"lora must be a PreparedLoRA, got {found}: call prepare_lora()")
    if not isinstance(lora, PreparedLoRA):
        raise TypeError(f"lora must be a PreparedLoRA, got {type(lora).__name__}")
    for part in lora.slices:
        if part.a.shape[2] != in_features:
            raise ValueError(
                f"lora must have the in_features of {base}, {in_features}, "
                f"got a of {list(part.a.shape)}"
            )
        if part.stop > out_features:
            raise ValueError(
                f"lora must write outputs of [0, {out_features}), got [{part.start}, {part.stop})"
            )
    for one, other in combinations(lora.slices, 2):
        if one.start < other.stop and other.start < one.stop:
            raise ValueError(
                f"slices must not overlap: [{one.start}, {one.stop}) and "
                f"[{other.start}, {other.stop})"
            )
    return lora.slices
