"""Make packed experts of a checkpoint's tensors, for the module that transformers has for them.

Source: ``DecompressExperts`` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from int4_lora.integration.checkpoint.experts import experts_weight
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES
from int4_lora.integration.huggingface.fused_experts import FusedExperts, LeftOutExperts
from int4_lora.integration.huggingface.hooks import carry_hooks
from int4_lora.integration.huggingface.int4_experts import DOWN, GATE_UP, Int4Experts
from int4_lora.reference import ExpertsWeight, PackedWeight, dequantize

__all__ = ["check_same", "int4_experts", "names_of"]

ROUNDING = 2**-7  # of the largest weight; transformers may have rounded scales and weights


def names_of(experts: FusedExperts) -> Iterator[tuple[str, str]]:
    """Yield the names of each expert's linears in the model, if it had them, and the stored ones.

    Args:
        experts: the experts.
    """
    for expert in range(experts.names.count):
        for part, stored in zip(experts.names.parts, experts.names.of(expert), strict=True):
            yield f"{experts.name}.{expert}.{part}", stored


@torch.no_grad()
def check_same(checkpoint: Checkpoint, experts: FusedExperts) -> None:
    """Check that experts can be read, and that dense ones are the checkpoint's.

    The first and the last expert are compared.

    Raises:
        ValueError: the model's experts differ from the checkpoint's.
    """
    if isinstance(experts.module, LeftOutExperts):
        return
    for expert in {0, experts.names.count - 1}:
        gate, up, down = (checkpoint.packed_weight(name) for name in experts.names.of(expert))
        stored = (GATE_UP, torch.cat([dequantize(gate), dequantize(up)])), (DOWN, dequantize(down))
        for name, weight in stored:
            held = experts.module.get_parameter(name)[expert]
            weight = weight.to(held.device, torch.float32)
            near = ROUNDING * weight.abs().max()
            if held.shape != weight.shape or not ((held.float() - weight).abs() <= near).all():
                raise ValueError(
                    f"{checkpoint.path}: expert {expert} differs from the model's "
                    f"{experts.name}.{name}: the model was loaded from another checkpoint"
                )


def int4_experts(
    checkpoint: Checkpoint, experts: FusedExperts, device: torch.device
) -> Int4Experts:
    """Return the packed experts for a module of transformers, with its mode and its hooks.

    Args:
        checkpoint: the checkpoint.
        experts: the experts.
        device: the device that computes.

    Raises:
        ValueError: a tensor cannot be read, or the experts cannot be held together; the message
            names them.
    """
    weight, module = experts_weight(checkpoint, experts.names), experts.module
    _check_taken_apart(checkpoint, experts, weight)
    dense: nn.Module = module.dense if isinstance(module, LeftOutExperts) else module
    dtype = module.dtype if isinstance(module, LeftOutExperts) else dense.get_parameter(DOWN).dtype
    first = experts.names.of(0)[2]
    shape = checkpoint.tensors.get(f"{first}.weight_shape")
    shape_dtype = None if shape is None else DTYPES.get(shape.dtype, torch.int64)
    if not checkpoint.is_pack_quantized(first):
        shape_dtype = torch.int64
    packed = Int4Experts(
        weight.to(device),
        experts.activation,
        names=experts.names.parts,
        dtype=dtype,
        shape_dtype=shape_dtype,
        scalars=not checkpoint.tensors[f"{first}.{checkpoint.layout(first).scale}"].shape,
        dense=dense,
    )
    for name in (GATE_UP, DOWN):
        dense._parameters.pop(name, None)
    packed.train(module.training)
    carry_hooks(module, packed)
    return packed


def _check_taken_apart(
    checkpoint: Checkpoint, experts: FusedExperts, weight: ExpertsWeight
) -> None:
    """Check that gate and up can be saved again, bit for bit.

    Raises:
        ValueError: they cannot; the message says why.
    """
    inter = weight.inter
    for expert, joined in enumerate(weight.gate_up):
        names = experts.names.of(expert)[:2]
        scale = checkpoint.tensors[f"{names[0]}.{checkpoint.layout(names[0]).scale}"]
        if joined.symmetric and tuple(scale.shape[:1]) == (inter,):
            continue  # the scales of rows are rows of those of both
        for name, rows in zip(names, (slice(0, inter), slice(inter, 2 * inter)), strict=True):
            if not _same_values(joined.rows(rows), checkpoint.packed_weight(name)):
                raise ValueError(
                    f"{checkpoint.path}: {name}: its scales or zero-points cannot be kept beside "
                    "those of the other half of gate and up, and saved again as they are"
                )


def _same_values(first: PackedWeight, second: PackedWeight) -> bool:
    """Return whether scales and zero-points of two weights are the same, bit for bit."""
    for name in ("scale", "zero_point"):
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):
            return False
    return True
