"""Quantise a weight again in the same groups, with the best of several scales for each group.

The best (s, z) of a group has the least sum of (w - w')^2, where q = clamp(round(w / s + z)) and
w' = RN((q - z) * s) in the scale's dtype. The candidates are the min-max rule of
``int4_lora.reference.quantize``, its scale times each of ``FACTORS``, and the group's previous
scale and zero-point. So no group has a larger error than with the min-max rule.

Source: ``int4_lora.reference.quantization`` for the min-max rule.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, pack
from int4_lora.reference.dequantization import scale_columns, scale_rows, zero_points
from int4_lora.reference.float4_weight import BaseWeight
from int4_lora.reference.merging import stored_zero_point
from int4_lora.reference.packing import code_range
from int4_lora.reference.quantization import quantize_groups

__all__ = ["Requantized", "requantize"]

FACTORS = (0.6, 0.64, 0.68, 0.72, 0.76, 0.8, 0.84, 0.88, 0.92, 0.96, 1.04, 1.08)


@dataclass(frozen=True, eq=False)
class Requantized:
    """A weight that was quantised again, and its error.

    Args:
        weight: the weight, in the same groups as before.
        squared_error: the sum of (w - w')^2, with w exact in float64.
        minmax_squared_error: the same sum with min-max scales.
        squared_norm: the sum of w^2.
        max_error: the largest |w - w'|.
    """

    weight: BaseWeight
    squared_error: float
    minmax_squared_error: float
    squared_norm: float
    max_error: float


@dataclass(frozen=True, eq=False)
class _Groups:
    """The groups of a weight: weight (i, j) has entry (row_of[i], column_of[j]) of a table."""

    row_of: Tensor
    column_of: Tensor
    shape: tuple[int, int]  # of a table

    def spread(self, table: Tensor) -> Tensor:
        """Return the entry of each weight: ``[out, in]``."""
        return table.index_select(0, self.row_of).index_select(1, self.column_of)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of ``[out, in]`` over each group, as a table."""
        rows = values.new_zeros(values.shape[0], self.shape[1]).index_add(1, self.column_of, values)
        return rows.new_zeros(self.shape).index_add(0, self.row_of, rows)


@torch.no_grad()
def requantize(exact: Tensor, like: PackedWeight, *, search: bool = True) -> Requantized:
    """Quantise a weight with the groups, symmetry, bits and scale dtype of another.

    Args:
        exact: float64 ``[out_features, in_features]``.
        like: the packed weight to imitate, whose scales are candidates too.
        search: whether to search for scales, or to use min-max scales.

    Raises:
        ValueError: a weight is not finite, or too large for the scale's dtype.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = torch.randn(8, 128, dtype=torch.float64)
        >>> result = requantize(weight, quantize(weight.float(), group_size=32))
        >>> result.squared_error <= result.minmax_squared_error
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
    weight = dataclasses.replace(
        like,
        packed=pack(codes, bits=like.bits),
        scale=scale.reshape(like.scale.shape),
        zero_point=stored_zero_point(like, zero),
    )
    difference = _values(codes, scale, zero, groups) - exact
    return Requantized(
        weight,
        float(best.sum()),
        float(minmax.sum()),
        float(exact.square().sum()),
        float(difference.abs().max()),
    )


def _searched(
    exact: Tensor, like: PackedWeight, groups: _Groups, start: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the errors, scales and zero-points of the best candidate of each group.

    Args:
        exact: the weight to quantise.
        like: the packed weight to imitate.
        groups: the groups of ``like``.
        start: the errors, scales and zero-points of the min-max rule.
    """
    minmax, scale, zero = start
    narrow = exact.to(torch.float32)  # precise enough to choose; errors are reported in float64
    least = _errors(narrow, scale, zero, groups, like.bits)
    best_scale, best_zero = scale, zero
    for candidate_scale, candidate_zero in _candidates(like, scale, zero):
        errors = _errors(narrow, candidate_scale, candidate_zero, groups, like.bits)
        better = errors < least
        least = torch.where(better, errors, least)
        best_scale = torch.where(better, candidate_scale, best_scale)
        best_zero = torch.where(better, candidate_zero, best_zero)
    errors = _errors(exact, best_scale, best_zero, groups, like.bits)
    better = errors < minmax
    return (
        torch.where(better, errors, minmax),
        torch.where(better, best_scale, scale),
        torch.where(better, best_zero, zero),
    )


def _candidates(like: PackedWeight, scale: Tensor, zero: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the candidate scales and zero-points other than the min-max rule's.

    Where a candidate's scale is not finite and positive, the min-max scale and zero-point replace
    it.
    """
    candidates = [((scale.float() * factor).to(scale.dtype), zero) for factor in FACTORS]
    zeros = zero_points(like)
    candidates.append(
        (like.scale.reshape(scale.shape), torch.zeros_like(zero) if zeros is None else zeros)
    )
    usable = []
    for candidate_scale, candidate_zero in candidates:
        valid = candidate_scale.isfinite() & (candidate_scale > 0)
        usable.append(
            (
                torch.where(valid, candidate_scale, scale),
                torch.where(valid, candidate_zero, zero),
            )
        )
    return usable


def _codes(exact: Tensor, scale: Tensor, zero: Tensor, groups: _Groups, bits: int) -> Tensor:
    """Return the codes of a weight: int8 ``[out, in]``."""
    low, high = code_range(bits)
    wide = (exact / groups.spread(scale.to(exact.dtype))) + groups.spread(zero.to(exact.dtype))
    return wide.clamp(low, high).round().to(torch.int8)


def _values(codes: Tensor, scale: Tensor, zero: Tensor, groups: _Groups) -> Tensor:
    """Dequantise codes; return the weights in float64."""
    centred = codes.to(torch.int16) - groups.spread(zero.to(torch.int16))
    return (centred.to(scale.dtype) * groups.spread(scale)).to(torch.float64)


def _errors(exact: Tensor, scale: Tensor, zero: Tensor, groups: _Groups, bits: int) -> Tensor:
    """Return the sum of squared errors of each group, in the dtype of ``exact``."""
    codes = _codes(exact, scale, zero, groups, bits)
    return groups.sums((_values(codes, scale, zero, groups).to(exact.dtype) - exact).square())
