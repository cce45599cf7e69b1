"""Adapters folded into the base weight: W + scaling * B A, dense or quantised again.

Source: arXiv:2106.09685, section 4.1 (no additional inference latency).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference.dequantization import (
    dequantize,
    exact_weight,
    scale_columns,
    scale_rows,
)
from int4_lora.reference.float4_weight import BaseWeight, dense_dtype
from int4_lora.reference.linear import check_slices
from int4_lora.reference.lora_stack import LoRASlice, LoRAStack, PackedLoRAStack
from int4_lora.reference.packed_weight import PackedWeight
from int4_lora.reference.packing import pack
from int4_lora.reference.quantization import quantize_groups
from int4_lora.reference.rounding import round_once

__all__ = ["MergeCost", "merge", "merge_quantized", "stored_zero_point"]


@dataclass(frozen=True)
class MergeCost:
    """The error of quantising a merged weight, against W + scaling * B A in float64.

    Args:
        max_error: the largest absolute difference of one weight, in the weight's units.
        relative_error: the Frobenius norm of the difference over that of the exact weight.
    """

    max_error: float
    relative_error: float


@torch.no_grad()
def merge(
    weight: BaseWeight, lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice], adapter: int
) -> Tensor:
    """Return the dense weight ``RN(W + scaling * B A)`` of one adapter.

    Args:
        weight: the packed base weight, INT4 or FP4.
        lora: adapters of the whole output, or slices of it.
        adapter: the adapter's index, in ``[0, adapters)``.

    Returns:
        ``[out_features, in_features]`` in the scale's dtype, bfloat16 for FP4, rounded once
        from float64; no gradient.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, or no such adapter.

    Example:
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> lora = LoRAStack.stack([(torch.ones(1, 8), torch.ones(1, 1), 0.25)])
        >>> merge(weight, lora, 0)[0, :3]
        tensor([-3.7500, -3.2500, -2.7500])

    Source:
        arXiv:2106.09685, section 4.1.
    """
    return round_once(_merged(weight, lora, adapter), dense_dtype(weight))


@torch.no_grad()
def merge_quantized(
    weight: PackedWeight, lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice], adapter: int
) -> tuple[PackedWeight, MergeCost]:
    """Merge one adapter and quantise the sum again, in the groups of ``weight``.

    Groups, symmetry, bits, g_idx and the scale's dtype stay as they are; the min-max rule of
    ``quantize`` computes new scales, zero-points and codes from the sum in float64.

    Args:
        weight: the packed base weight.
        lora: adapters of the whole output, or slices of it.
        adapter: the adapter's index, in ``[0, adapters)``.

    Returns:
        The merged packed weight, and the error that quantising it made.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, no such adapter, or a sum that is not finite or too
            large for the scale's dtype.

    Example:
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> lora = LoRAStack.stack([(torch.ones(1, 8), torch.ones(1, 1), 0.25)])
        >>> merged, cost = merge_quantized(weight, lora, 0)
        >>> merged.scale.item(), cost.max_error
        (0.5, 0.25)

    Source:
        arXiv:2106.09685, section 4.1.
    """
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"weight must be a PackedWeight, got {type(weight).__name__}")
    exact = _merged(weight, lora, adapter)
    table = (1, 1) if weight.scale.ndim == 1 else (weight.scale.shape[0], weight.scale.shape[1])
    codes, scale, zero_point = quantize_groups(
        exact,
        scale_rows(weight),
        scale_columns(weight),
        table,
        weight.symmetric,
        weight.scale.dtype,
        weight.bits,
    )
    merged = dataclasses.replace(
        weight,
        packed=pack(codes, bits=weight.bits),
        scale=scale.reshape(weight.scale.shape),
        zero_point=stored_zero_point(weight, zero_point),
    )
    difference = dequantize(merged, torch.float64) - exact
    norm = torch.linalg.matrix_norm(exact).item()
    lost = torch.linalg.matrix_norm(difference).item()
    relative = lost / norm if norm else 0.0 if lost == 0 else float("inf")
    return merged, MergeCost(difference.abs().max().item(), relative)


def stored_zero_point(weight: PackedWeight, zero_point: Tensor) -> Tensor | None:
    """Return int8 zero-points in the form that ``weight`` stores: absent, packed or unpacked."""
    if weight.zero_point is None:
        return None
    if weight.zero_point.dtype == torch.int32:
        return pack(zero_point, bits=weight.bits, dim=0)
    return zero_point.reshape(weight.scale.shape)


def _merged(
    weight: BaseWeight, lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice], adapter: int
) -> Tensor:
    """Return W + scaling * B A in float64: ``[out_features, in_features]``."""
    slices = check_slices(weight, lora)
    if not slices:
        raise ValueError(f"lora must hold adapters, got {lora!r}")
    if type(adapter) is not int:
        raise TypeError(f"adapter must be an int, got {type(adapter).__name__}")
    adapters = slices[0].stack.adapters
    if not 0 <= adapter < adapters:
        raise ValueError(f"adapter must be in [0, {adapters}), got {adapter}")
    dense = exact_weight(weight)
    for part in slices:
        a = part.stack.a[adapter].to(torch.float64)  # [rank, in_features]
        b = part.stack.b[adapter].to(torch.float64)  # [part, rank]
        dense[part.start : part.stop] += part.stack.scaling[adapter].to(torch.float64) * (b @ a)
    return dense
