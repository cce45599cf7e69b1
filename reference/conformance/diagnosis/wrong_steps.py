"""Steps of the definition done wrong, for the table in ``mistakes.py``.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, PackedWeight
from int4_lora.reference.conformance.diagnosis.definition_steps import RIGHT, rounded_product
from int4_lora.reference.dequantization import scale_columns

__all__ = [
    "axis_of_words",
    "axis_transposed",
    "column_order",
    "cut_evenly",
    "groups_reversed",
    "groups_sorted",
    "permuted",
    "rounded_apart",
    "rounded_apart_kept",
    "rounded_offset",
    "scale_as",
    "starts",
    "top_without_mask",
    "without_last",
    "without_mask",
    "without_tail",
]


def without_mask(bits: int) -> Callable[[Tensor], Tensor]:
    """Return a mask that keeps what ``>>`` copied: cut to ``bits`` as a cast does."""

    def mask(shifted: Tensor) -> Tensor:
        wide = shifted.to(torch.int64) - 8
        half = 1 << (bits - 1)
        return ((wide + half) % (1 << bits)) - half + 8

    return mask


def top_without_mask(shifted: Tensor) -> Tensor:
    """Mask every code but the last of a word."""
    stored = shifted & 0xF
    stored[..., 7] = shifted[..., 7]
    return stored


def column_order(weight: PackedWeight) -> Tensor:
    """Cut the columns into groups in their own order."""
    columns, groups = weight.in_features, weight.scale.shape[-1]
    if weight.g_idx is None or isinstance(weight.group_size, tuple):
        return scale_columns(weight)
    return (torch.arange(columns) // -(-columns // groups)).clamp(max=groups - 1)


def groups_reversed(weight: PackedWeight) -> Tensor:
    """Take the last group's scale for the first columns."""
    return weight.scale.shape[-1] - 1 - scale_columns(weight)


def groups_sorted(weight: PackedWeight) -> Tensor:
    """Sort g_idx."""
    return scale_columns(weight).sort().values


def cut_evenly(weight: PackedWeight) -> Tensor:
    """Sort the columns by their groups, and cut them into groups of equal size."""
    if weight.g_idx is None:
        return scale_columns(weight)
    order = weight.g_idx.argsort()  # not stable: which of equal ones come first is torch's choice
    columns = torch.empty_like(order)
    columns[order] = column_order(weight)
    return columns


def permuted(inverse: bool) -> Callable[[Tensor, PackedWeight], Tensor]:
    """Return columns in the order of their groups, or in the inverse of it."""

    def columns(dense: Tensor, weight: PackedWeight) -> Tensor:
        order = scale_columns(weight).argsort(stable=True)
        return dense[:, order.argsort() if inverse else order]

    return columns


def axis_transposed(table: Tensor, weight: PackedWeight) -> Tensor:
    """Read the table of zero-points by columns."""
    return table.T.reshape(table.shape)


def axis_of_words(table: Tensor, weight: PackedWeight) -> Tensor:
    """Read the words of [words, groups] as rows that follow one another."""
    if weight.zero_point is None or weight.zero_point.dtype != torch.int32:
        return table
    stored = (weight.zero_point.unsqueeze(2) >> RIGHT.shifts()) & 0xF  # [words, groups, 8]
    return (stored.flatten()[: table.numel()].to(torch.int64) - 8).reshape(table.shape)


def rounded_apart(
    codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return RN(RN(q s) - RN(z s)), where there are zero-points."""
    if not bool(zero_points.any()):
        return rounded_product(codes, zero_points, scale, centre)
    first, second = codes.to(scale.dtype) * scale, zero_points.to(scale.dtype) * scale
    return centre(first, second).to(torch.float64)


def rounded_apart_kept(
    codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return RN(q s) - RN(z s), where there are zero-points."""
    if not bool(zero_points.any()):
        return rounded_product(codes, zero_points, scale, centre)
    first, second = codes.to(scale.dtype) * scale, zero_points.to(scale.dtype) * scale
    return centre(first.double(), second.double())


def rounded_offset(
    codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return q s - RN(z s), where there are zero-points: a table of offsets."""
    if not bool(zero_points.any()):
        return rounded_product(codes, zero_points, scale, centre)
    second = zero_points.to(scale.dtype) * scale
    return centre(codes.double() * scale.double(), second.double())


def scale_as(dtype: torch.dtype, kept: bool) -> Callable[..., Tensor]:
    """Return a product by the scale in ``dtype``, in which the weight is then kept, or not."""

    def product(
        codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[..., Tensor]
    ) -> Tensor:
        low = scale.to(dtype)
        return rounded_product(codes, zero_points, low if kept else low.to(scale.dtype), centre)

    return product


def without_tail(multiple: int) -> Callable[[Tensor, PackedWeight], Tensor]:
    """Return the weights without the inputs beyond a multiple; all of them if there is none."""

    def columns(dense: Tensor, weight: PackedWeight) -> Tensor:
        kept = dense.shape[1] // multiple * multiple or dense.shape[1]
        return torch.cat([dense[:, :kept], torch.zeros_like(dense[:, kept:])], dim=1)

    return columns


def without_last(multiple: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Return the result with zeros beyond a multiple along ``dim``."""

    def outputs(result: Tensor) -> Tensor:
        if result.ndim <= dim:
            return result
        kept = result.shape[dim] // multiple * multiple or result.shape[dim]
        result = result.clone()
        result.narrow(dim, kept, result.shape[dim] - kept).zero_()
        return result

    return outputs


def starts(order: Sequence[int]) -> Callable[[Sequence[LoRASlice]], list[int]]:
    """Return the slices' starts in another order."""

    def starts(slices: Sequence[LoRASlice]) -> list[int]:
        if len(slices) != len(order):
            return [part.start for part in slices]
        return [slices[index].start for index in order]

    return starts
