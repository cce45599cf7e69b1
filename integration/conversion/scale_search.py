"""Scales for weights that are quantised again: the best of a few for each group.

For each group, among the candidates (s, z): the one with the least sum of (w - w')^2, where
q = clamp(round(w / s + z)) and w' = RN((q - z) * s) in the scale's dtype. The candidates are the
min-max rule of ``int4_lora.reference.quantize``, its scale times ``FACTORS``, and the scale and
zero-point that the group had. So no group is worse off than by min-max.

Source: ``int4_lora.reference.quantization`` for the min-max rule.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, pack, unpack
from int4_lora.reference.dequantization import scale_columns, scale_rows
from int4_lora.reference.merging import stored_zero_point
from int4_lora.reference.packing import code_range
from int4_lora.reference.quantization import quantize_groups

__all__ = ["Requantized", "requantize"]

FACTORS = (0.6, 0.64, 0.68, 0.72, 0.76, 0.8, 0.84, 0.88, 0.92, 0.96, 1.04, 1.08)


@dataclass(frozen=True, eq=False)
class Requantized:
    """A weight that was quantised again, and what that cost.

    Args:
        weight: in the grouping of the one before.
        squared_error: the sum of (w - w')^2 against the exact weight, in float64.
        minmax_squared_error: the same by the min-max rule alone.
        squared_norm: the sum of w^2 of the exact weight.
        max_error: the largest |w - w'|.
    """

    weight: PackedWeight
    squared_error: float
    minmax_squared_error: float
    squared_norm: float
    max_error: float


@dataclass(frozen=True, eq=False)
class _Groups:
    """Which rows and columns share a scale: a table of scales spread over a weight, and back."""

    row_of: Tensor
    column_of: Tensor
    shape: tuple[int, int]

    def spread(self, table: Tensor) -> Tensor:
        """Return ``[out, in]`` of a table's entries."""
        return table.index_select(0, self.row_of).index_select(1, self.column_of)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum over each group of ``[out, in]``."""
        rows = values.new_zeros(values.shape[0], self.shape[1]).index_add(1, self.column_of, values)
        return rows.new_zeros(self.shape).index_add(0, self.row_of, rows)


@torch.no_grad()
def requantize(exact: Tensor, like: PackedWeight, *, search: bool = True) -> Requantized:
    """Quantise a weight in the grouping, symmetry, bits and dtype of scales of another.

    Args:
        exact: float64 ``[out_features, in_features]``.
        like: the packed weight that it was.
        search: whether scales are searched for; otherwise they are min-max.

    Raises:
        ValueError: a weight that is not finite, or too large for the scale's dtype.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = torch.randn(8, 128, dtype=torch.float64)
        >>> found = requantize(weight, quantize(weight.float(), group_size=32))
        >>> found.squared_error <= found.minmax_squared_error
        True
    """
    table = (1, 1) if like.scale.ndim == 1 else (like.scale.shape[0], like.scale.shape[1])
    groups = _Groups(scale_rows(like), scale_columns(like), table)
    _, scale, zero = quantize_groups(
        exact,
        groups.row_of,
        groups.column_of,
        table,
        like.symmetric,
        like.scale.dtype,
        like.bits,
    )
    minmax = _errors(exact, scale, zero, groups, like.bits)
    best = minmax
    if search:
        best, scale, zero = _searched(exact, like, groups, (minmax, scale, zero))
    codes = _codes(exact, scale, zero, groups, like.bits)
    found = dataclasses.replace(
        like,
        packed=pack(codes, bits=like.bits),
        scale=scale.reshape(like.scale.shape),
        zero_point=stored_zero_point(like, zero),
    )
    difference = _values(codes, scale, zero, groups) - exact
    return Requantized(
        found,
        float(best.sum()),
        float(minmax.sum()),
        float(exact.square().sum()),
        float(difference.abs().max()),
    )


def _searched(
    exact: Tensor, like: PackedWeight, groups: _Groups, start: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the errors, scales and zero-points of the best candidates."""
    minmax, scale, zero = start
    narrow = exact.to(torch.float32)  # says which is best; what it costs is counted in float64
    least = _errors(narrow, scale, zero, groups, like.bits)
    chosen, chosen_zero = scale, zero
    for candidate, its_zero in _candidates(like, scale, zero):
        errors = _errors(narrow, candidate, its_zero, groups, like.bits)
        better = errors < least
        least = torch.where(better, errors, least)
        chosen = torch.where(better, candidate, chosen)
        chosen_zero = torch.where(better, its_zero, chosen_zero)
    found = _errors(exact, chosen, chosen_zero, groups, like.bits)
    better = found < minmax
    return (
        torch.where(better, found, minmax),
        torch.where(better, chosen, scale),
        torch.where(better, chosen_zero, zero),
    )


def _candidates(like: PackedWeight, scale: Tensor, zero: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return scales and zero-points to try beside the min-max ones; all are usable."""
    found = [((scale.float() * factor).to(scale.dtype), zero) for factor in FACTORS]
    found.append((like.scale.reshape(scale.shape), _zero_points(like, scale.shape)))
    usable = []
    for candidate, its_zero in found:
        fine = candidate.isfinite() & (candidate > 0)
        usable.append((torch.where(fine, candidate, scale), torch.where(fine, its_zero, zero)))
    return usable


def _zero_points(weight: PackedWeight, table: torch.Size) -> Tensor:
    """Return the zero-points of a weight, unpacked: int8 of the table's shape."""
    if weight.zero_point is None:
        return torch.zeros(table, dtype=torch.int8)
    if weight.zero_point.dtype == torch.int8:
        return weight.zero_point.reshape(table)
    return unpack(weight.zero_point, weight.out_features, bits=weight.bits, dim=0)


def _codes(exact: Tensor, scale: Tensor, zero: Tensor, groups: _Groups, bits: int) -> Tensor:
    low, high = code_range(bits)
    wide = (exact / groups.spread(scale.to(exact.dtype))) + groups.spread(zero.to(exact.dtype))
    return wide.clamp(low, high).round().to(torch.int8)


def _values(codes: Tensor, scale: Tensor, zero: Tensor, groups: _Groups) -> Tensor:
    """Return the weights that codes stand for, in float64."""
    centred = codes.to(torch.int16) - groups.spread(zero.to(torch.int16))
    return (centred.to(scale.dtype) * groups.spread(scale)).to(torch.float64)


def _errors(exact: Tensor, scale: Tensor, zero: Tensor, groups: _Groups, bits: int) -> Tensor:
    """Return the sum of squared errors of each group, in the dtype of ``exact``."""
    codes = _codes(exact, scale, zero, groups, bits)
    return groups.sums((_values(codes, scale, zero, groups).to(exact.dtype) - exact).square())
