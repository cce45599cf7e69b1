"""Lay out a checkpoint's tensors and adapters for the compiled path, once, at load time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from int4_lora.compiled.adapters.prepared import PreparedLoRA, PreparedSlice
from int4_lora.compiled.layouts import float4, int4pack, int8, interleaved
from int4_lora.compiled.layouts.checkpoint import CheckpointWeight
from int4_lora.compiled.layouts.float4 import BlockedFloat4Weight
from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.layouts.int8 import Int8Weight
from int4_lora.compiled.layouts.interleaved import InterleavedWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference import Float4Weight, LoRASlice, LoRAStack, PackedLoRAStack
from int4_lora.reference.float4_weight import BaseWeight, check_weight
from int4_lora.reference.linear import as_slices

__all__ = ["layouts", "prepare", "prepare_lora"]


@torch.no_grad()
def prepare(weight: BaseWeight, *, layout: str | None = None) -> PreparedWeight:
    """Lay out a weight for the formulations of its device.

    Args:
        weight: the checkpoint's tensors, INT4, INT8 or FP4, on the device that will compute.
        layout: a name from ``layouts(weight)``; None for the first of them.

    Returns:
        The prepared weight; its ``packed_weight()`` returns the checkpoint's tensors.

    Raises:
        TypeError: ``weight`` is neither a PackedWeight nor a Float4Weight.
        ValueError: there is no such layout, or it cannot hold this weight; the message says why.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = quantize(torch.randn(32, 256), group_size=128)
        >>> prepared = prepare(weight)
        >>> torch.equal(prepared.packed_weight().packed, weight.packed)
        True
    """
    refusals = _refusals(weight)
    if layout is None:
        layout = next(name for name, reason in refusals.items() if reason is None)
    elif layout not in refusals:
        raise ValueError(f"layout must be one of {list(refusals)}, got {layout!r}")
    elif refusals[layout] is not None:
        raise ValueError(f"layout {layout!r} cannot hold this weight: {refusals[layout]}")
    if isinstance(weight, Float4Weight):
        if layout == "float4":
            return BlockedFloat4Weight.from_float4(weight)
        return CheckpointWeight(weight)
    if layout == "int4pack":
        return Int4PackWeight.from_packed(weight)
    if layout == "interleaved":
        return InterleavedWeight.from_packed(weight)
    if layout == "int8":
        return Int8Weight.from_packed(weight)
    return CheckpointWeight(weight)


def layouts(weight: BaseWeight) -> list[str]:
    """Return the layouts that can hold a weight, the default of ``prepare`` first.

    Example:
        >>> from int4_lora.reference import quantize
        >>> layouts(quantize(torch.randn(32, 256), group_size=4))
        ['checkpoint']
    """
    return [name for name, reason in _refusals(weight).items() if reason is None]


def _refusals(weight: BaseWeight) -> dict[str, str | None]:
    """Return, by layout, why it cannot hold a weight, or None; the preferred layout comes first."""
    check_weight(weight)
    if isinstance(weight, Float4Weight):
        return {"float4": float4.refuses(weight), "checkpoint": None}
    operator = {"int4pack": int4pack.refuses(weight)}
    words = {"interleaved": interleaved.refuses(weight)}
    others = {"int8": int8.refuses(weight), "checkpoint": None}
    if weight.scale.dtype == torch.float32:  # torch's operator has no fast code for them
        return {**words, **operator, **others}
    return {**operator, **words, **others}


def prepare_lora(
    lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice],
) -> PreparedLoRA:
    """Copy adapters into the layout of the compiled path; gradients flow back through the copy.

    Args:
        lora: adapters of all outputs, or of slices of the outputs that do not overlap. Adapters in
            INT4 are dequantised here, to the dtype of their scales.

    Returns:
        The prepared adapters; ``update`` replaces an adapter in place.

    Raises:
        TypeError: ``lora`` is neither a LoRAStack nor a sequence of LoRASlice.
        ValueError: there are no slices, or they differ in their number of adapters.

    Example:
        >>> stack = LoRAStack.stack([(torch.ones(2, 8), torch.ones(4, 2), 1.0)])
        >>> prepare_lora(stack).slices[0].bt.shape
        torch.Size([1, 2, 4])
    """
    slices = as_slices(lora)
    if not slices:
        raise ValueError("lora must be a LoRAStack or LoRASlices, got none")
    return PreparedLoRA(tuple(map(_prepared, slices)))


def _prepared(part: LoRASlice) -> PreparedSlice:
    """Copy the adapters of one slice."""
    stack = part.stack
    prepared = PreparedSlice(
        a=stack.a.clone(memory_format=torch.contiguous_format),
        bt=stack.b.transpose(1, 2).clone(memory_format=torch.contiguous_format),
        scaling=stack.scaling.clone(),
        start=part.start,
    )
    finite = stack.b.detach().isfinite().flatten(1).all(1).tolist()
    for adapter, its_b_is_finite in enumerate(finite):
        prepared.note_finite(adapter, its_b_is_finite)
    return prepared
