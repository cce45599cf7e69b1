"""From a checkpoint's tensors to the one layout that they are computed in.

Source: the contract of ``int4_lora.compiled``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from int4_lora.compiled.adapters.prepared import PreparedLoRA, PreparedSlice
from int4_lora.compiled.layouts import int4pack as int4pack_weight
from int4_lora.compiled.layouts import interleaved as planes_weight
from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.layouts.interleaved import PlanesWeight
from int4_lora.compiled.layouts.layout import CheckpointWeight, PreparedWeight
from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight
from int4_lora.reference.linear import as_slices

__all__ = ["layouts", "prepare", "prepare_lora"]


@torch.no_grad()
def prepare(weight: PackedWeight, *, layout: str | None = None) -> PreparedWeight:
    """Lay a weight out, once, for the formulations of its device.

    Args:
        weight: the checkpoint's tensors, on the device that will compute.
        layout: one of ``layouts(weight)``, or None for the first of them.

    Returns:
        The weight in one layout; ``packed_weight()`` gives the checkpoint's tensors back.

    Raises:
        TypeError: ``weight`` is no PackedWeight.
        ValueError: a layout that cannot hold this weight; the message says why.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = quantize(torch.randn(32, 256), group_size=128)
        >>> prepared = prepare(weight)
        >>> torch.equal(prepared.packed_weight().packed, weight.packed)
        True

    Source:
        The contract of ``int4_lora.compiled``.
    """
    refusals = _refusals(weight)
    if layout is None:
        layout = next(name for name, why in refusals.items() if why is None)
    elif layout not in refusals:
        raise ValueError(f"layout must be one of {list(refusals)}, got {layout!r}")
    elif refusals[layout] is not None:
        raise ValueError(f"layout {layout!r} cannot hold this weight: {refusals[layout]}")
    if layout == "int4pack":
        return Int4PackWeight.from_packed(weight)
    return PlanesWeight.from_packed(weight) if layout == "planes" else CheckpointWeight(weight)


def layouts(weight: PackedWeight) -> list[str]:
    """Return the layouts that can hold a weight, the one that ``prepare`` takes first.

    Example:
        >>> from int4_lora.reference import quantize
        >>> layouts(quantize(torch.randn(32, 256), group_size=4))
        ['checkpoint']
    """
    return [name for name, why in _refusals(weight).items() if why is None]


def _refusals(weight: PackedWeight) -> dict[str, str | None]:
    """Return why each layout cannot hold a weight, or None, the preferred layout first."""
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"weight must be a PackedWeight, got {type(weight).__name__}")
    int4pack = {"int4pack": int4pack_weight.refuses(weight)}
    planes = {"planes": planes_weight.refuses(weight)}
    if weight.scale.dtype == torch.float32:  # for which torch's operator has no fast code
        return {**planes, **int4pack, "checkpoint": None}
    return {**int4pack, **planes, "checkpoint": None}


def prepare_lora(lora: LoRAStack | Sequence[LoRASlice]) -> PreparedLoRA:
    """Lay adapters out for the compiled path; gradients flow back through it.

    Args:
        lora: adapters of the whole output, or slices of it that do not overlap.

    Returns:
        The adapters; ``update`` replaces one in place.

    Raises:
        TypeError: ``lora`` is neither.
        ValueError: no slices, or slices that do not hold as many adapters.

    Example:
        >>> stack = LoRAStack.stack([(torch.ones(2, 8), torch.ones(4, 2), 1.0)])
        >>> prepare_lora(stack).slices[0].bt.shape
        torch.Size([1, 2, 4])

    Source:
        The contract of ``int4_lora.compiled``.
    """
    slices = as_slices(lora)
    if not slices:
        raise ValueError("lora must be a LoRAStack or LoRASlices, got none")
    return PreparedLoRA(
        tuple(
            PreparedSlice(
                a=part.stack.a.clone(memory_format=torch.contiguous_format),
                bt=part.stack.b.transpose(1, 2).clone(memory_format=torch.contiguous_format),
                scaling=part.stack.scaling.clone(),
                start=part.start,
                finite=bool(part.stack.b.detach().isfinite().all()),
            )
            for part in slices
        )
    )
