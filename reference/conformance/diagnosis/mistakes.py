"""The mistakes that INT4 + LoRA code has had, each as one replaced step of the definition.

A name may have several variants, since one mistake can be made in several ways. A mistake is named
only where one of its variants reproduces the result. The table is at the end; that of experts is in
``expert_mistakes.py``.

Source: ``docs/conformance.md``, which says where each was met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, PackedWeight
from int4_lora.reference.conformance.diagnosis.definition_steps import RIGHT, Way, rounded_product
from int4_lora.reference.conformance.diagnosis.float4_mistakes import FLOAT4_MISTAKES
from int4_lora.reference.conformance.diagnosis.layout_mistakes import LAYOUT_MISTAKES
from int4_lora.reference.dequantization import scale_columns

__all__ = ["IDENTIFIERS", "MISTAKES", "Mistake"]

IDENTIFIERS = (
    *LAYOUT_MISTAKES,  # first: offset explains what gptq_zero_plus_one does, too
    *FLOAT4_MISTAKES,  # nibble_order is a mistake of INT4, too
    "offset",
    "sign_extension",
    "zero_point_sign",
    "zero_point_axis",
    "zero_point_plus_one",
    "groups_reversed",
    "g_idx_ignored",
    "g_idx_column_order",
    "g_idx_minus_one_indexed",
    "round_before_subtract",
    "scale_rounded",
    "low_precision_accumulate",
    "adapter_minus_one_indexed",
    "masked_by_multiplication",
    "scaling_missing",
    "scaling_twice",
    "slices_swapped",
    "tail_lost",
    "stale_adapter_ids",
    "expert_adapters_dropped",
    "expert_and_adapter_swapped",
    "gate_up_swapped",
    "weights_before_activation",
    "routed_weight_missing",
    "shared_order",
    "dropped_expert_indexed",
    "repeated_expert_once",
    "unknown",
)
"""Every name that a diagnosis can give."""


@dataclass(frozen=True)
class Mistake:
    """One step done wrong in one way.

    Args:
        name: one of ``IDENTIFIERS``.
        variant: what exactly is done, in words.
        step: the field of ``Way`` that is replaced.
        wrong: the function that replaces it.
    """

    name: str
    variant: str
    step: str
    wrong: Callable[..., Any]

    def within(self, way: Way) -> Way:
        """Return ``way`` with this mistake made."""
        changed: dict[str, Any] = {self.step: self.wrong}
        return replace(way, **changed)


def _without_mask(bits: int) -> Callable[[Tensor], Tensor]:
    """Return a step that keeps the sign bits that ``>>`` copied, and casts to ``bits`` bits."""

    def mask(shifted: Tensor) -> Tensor:
        wide = shifted.to(torch.int64) - 8
        half = 1 << (bits - 1)
        return ((wide + half) % (1 << bits)) - half + 8

    return mask


def _top_without_mask(shifted: Tensor) -> Tensor:
    """Mask every code but the last of a word."""
    stored = shifted & 0xF
    stored[..., 7] = shifted[..., 7]
    return stored


def _column_order(weight: PackedWeight) -> Tensor:
    """Group the columns by position, whatever g_idx says."""
    columns, groups = weight.in_features, weight.scale.shape[-1]
    if weight.g_idx is None or isinstance(weight.group_size, tuple):
        return scale_columns(weight)
    return (torch.arange(columns) // -(-columns // groups)).clamp(max=groups - 1)


def _groups_reversed(weight: PackedWeight) -> Tensor:
    """Use the last group's scale for the first columns."""
    return weight.scale.shape[-1] - 1 - scale_columns(weight)


def _groups_sorted(weight: PackedWeight) -> Tensor:
    """Sort g_idx."""
    return scale_columns(weight).sort().values


def _cut_evenly(weight: PackedWeight) -> Tensor:
    """Sort the columns by their groups, and cut them into groups of equal size."""
    if weight.g_idx is None:
        return scale_columns(weight)
    order = weight.g_idx.argsort()  # not stable: torch decides the order within a group
    columns = torch.empty_like(order)
    columns[order] = _column_order(weight)
    return columns


def _minus_one_as(group: int) -> Callable[[PackedWeight], Tensor]:
    """Return a step that uses g_idx as an index, in which -1 is a group like the others."""

    def columns(weight: PackedWeight) -> Tensor:
        if weight.g_idx is None:
            return scale_columns(weight)
        g_idx = weight.g_idx.to(torch.int64)
        return torch.where(g_idx < 0, group % weight.scale.shape[-1], g_idx)

    return columns


def _column_order_of_each(weight: PackedWeight) -> Tensor:
    """Read a -1 as column order for its column alone, and g_idx for the others."""
    g_idx = weight.g_idx
    if g_idx is None:
        return scale_columns(weight)
    return torch.where(g_idx < 0, _column_order(weight), g_idx.to(torch.int64))


def _permuted(inverse: bool) -> Callable[[Tensor, PackedWeight], Tensor]:
    """Return a step that leaves the columns sorted by group, or applies the inverse order."""

    def columns(dense: Tensor, weight: PackedWeight) -> Tensor:
        order = scale_columns(weight).argsort(stable=True)
        return dense[:, order.argsort() if inverse else order]

    return columns


def _axis_transposed(table: Tensor, weight: PackedWeight) -> Tensor:
    """Read the table of zero-points by columns."""
    return table.T.reshape(table.shape)


def _axis_of_words(table: Tensor, weight: PackedWeight) -> Tensor:
    """Read the words of [words, groups] row by row, as if packed along the groups."""
    if weight.zero_point is None or weight.zero_point.dtype != torch.int32:
        return table
    stored = (weight.zero_point.unsqueeze(2) >> RIGHT.shifts()) & 0xF  # [words, groups, 8]
    return (stored.flatten()[: table.numel()].to(torch.int64) - 8).reshape(table.shape)


def _rounded_apart(
    codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return RN(RN(q s) - RN(z s)), where there are zero-points."""
    if not bool(zero_points.any()):
        return rounded_product(codes, zero_points, scale, centre)
    first, second = codes.to(scale.dtype) * scale, zero_points.to(scale.dtype) * scale
    return centre(first, second).to(torch.float64)


def _rounded_apart_kept(
    codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return RN(q s) - RN(z s), where there are zero-points."""
    if not bool(zero_points.any()):
        return rounded_product(codes, zero_points, scale, centre)
    first, second = codes.to(scale.dtype) * scale, zero_points.to(scale.dtype) * scale
    return centre(first.double(), second.double())


def _rounded_offset(
    codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return q s - RN(z s), where there are zero-points: a table of offsets."""
    if not bool(zero_points.any()):
        return rounded_product(codes, zero_points, scale, centre)
    second = zero_points.to(scale.dtype) * scale
    return centre(codes.double() * scale.double(), second.double())


def _scale_as(dtype: torch.dtype, kept: bool) -> Callable[..., Tensor]:
    """Return a step that rounds the scale to ``dtype``, and if ``kept`` the weight, too."""

    def product(
        codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[..., Tensor]
    ) -> Tensor:
        low = scale.to(dtype)
        return rounded_product(codes, zero_points, low if kept else low.to(scale.dtype), centre)

    return product


def _without_tail(multiple: int) -> Callable[[Tensor, PackedWeight], Tensor]:
    """Return a step that drops the inputs beyond the last multiple, if there is one."""

    def columns(dense: Tensor, weight: PackedWeight) -> Tensor:
        kept = dense.shape[1] // multiple * multiple or dense.shape[1]
        return torch.cat([dense[:, :kept], torch.zeros_like(dense[:, kept:])], dim=1)

    return columns


def _without_last(multiple: int, dim: int) -> Callable[[Tensor], Tensor]:
    """Return a step that zeroes the result beyond the last multiple along ``dim``."""

    def outputs(result: Tensor) -> Tensor:
        if result.ndim <= dim:
            return result
        kept = result.shape[dim] // multiple * multiple or result.shape[dim]
        result = result.clone()
        result.narrow(dim, kept, result.shape[dim] - kept).zero_()
        return result

    return outputs


def _all_multiplied(
    total: Tensor, product: Tensor, of_zeros: Tensor, ids: Tensor, adapter: int, adapters: int
) -> Tensor:
    """Add the product of every adapter to all tokens, times 1 or 0."""
    return total + (ids == adapter)[:, None] * product


def _inputs_zeroed(
    total: Tensor, product: Tensor, of_zeros: Tensor, ids: Tensor, adapter: int, adapters: int
) -> Tensor:
    """Add the product of every adapter to all tokens, with zeros for the other tokens' inputs."""
    return total + torch.where((ids == adapter)[:, None], product, of_zeros)


def _multiplied_for_none(stand_in: int) -> Callable[..., Tensor]:
    """Return a step that uses an adapter for the tokens without one, times 0."""

    def added(
        total: Tensor, product: Tensor, of_zeros: Tensor, ids: Tensor, adapter: int, adapters: int
    ) -> Tensor:
        used = torch.where(ids < 0, stand_in % adapters, ids)
        return torch.where((used == adapter)[:, None], (ids >= 0)[:, None] * product, total)

    return added


def _starts(order: Sequence[int]) -> Callable[[Sequence[LoRASlice]], list[int]]:
    """Return a step that exchanges the starts of the slices."""

    def starts(slices: Sequence[LoRASlice]) -> list[int]:
        if len(slices) != len(order):
            return [part.start for part in slices]
        return [slices[index].start for index in order]

    return starts


HALF, BRAIN = torch.float16, torch.bfloat16
ORDERS = [o for count in (2, 3) for o in permutations(range(count)) if o != tuple(range(count))]

MISTAKES: tuple[Mistake, ...] = (
    *(
        Mistake(name, variant, "layout", wrong)
        for name, variants in LAYOUT_MISTAKES.items()
        for variant, wrong in variants.items()
    ),
    Mistake("nibble_order", "the first code in the highest bits", "shifts",
            lambda: 4 * torch.arange(7, -1, -1, dtype=torch.int32)),
    Mistake("nibble_order", "the codes of each byte in the other order", "shifts",
            lambda: 4 * torch.tensor([1, 0, 3, 2, 5, 4, 7, 6], dtype=torch.int32)),
    *(
        Mistake(name, variant, step, wrong)
        for name, variants in FLOAT4_MISTAKES.items()
        for variant, (step, wrong) in variants.items()
    ),
    *(
        Mistake("offset", f"q = u - {by}", "code", lambda stored, by=by: stored - by)
        for by in (7, 9, 0)
    ),
    Mistake("sign_extension", "no mask, cut to int8", "mask", _without_mask(8)),
    Mistake("sign_extension", "no mask", "mask", _without_mask(33)),
    Mistake("sign_extension", "no mask on the last code", "mask", _top_without_mask),
    Mistake("sign_extension", "read as two's complement", "code",
            lambda stored: (stored ^ 8) - 8),
    Mistake("zero_point_sign", "q + z", "centre", lambda codes, zero: codes + zero),
    Mistake("zero_point_axis", "the table transposed", "zero_points", _axis_transposed),
    Mistake("zero_point_axis", "packed along groups", "zero_points", _axis_of_words),
    Mistake("zero_point_plus_one", "z + 1", "zero_points", lambda table, weight: table + 1),
    Mistake("zero_point_plus_one", "z - 1", "zero_points", lambda table, weight: table - 1),
    Mistake("groups_reversed", "the last group first", "group", _groups_reversed),
    Mistake("g_idx_ignored", "groups in column order", "group", _column_order),
    Mistake("g_idx_column_order", "g_idx sorted", "group", _groups_sorted),
    Mistake("g_idx_column_order", "sorted by g_idx, cut into equal groups", "group",
            _cut_evenly),
    Mistake("g_idx_column_order", "weights left sorted by group", "columns", _permuted(False)),
    Mistake("g_idx_column_order", "weights sorted back that were not", "columns",
            _permuted(True)),
    Mistake("g_idx_minus_one_indexed", "the last group", "group", _minus_one_as(-1)),
    Mistake("g_idx_minus_one_indexed", "the first group", "group", _minus_one_as(0)),
    Mistake("g_idx_minus_one_indexed", "column order for its columns alone", "group",
            _column_order_of_each),
    Mistake("round_before_subtract", "RN(RN(q s) - RN(z s))", "product", _rounded_apart),
    Mistake("round_before_subtract", "RN(q s) - RN(z s)", "product", _rounded_apart_kept),
    Mistake("round_before_subtract", "q s - RN(z s)", "product", _rounded_offset),
    *(
        Mistake("scale_rounded", f"to {str(dtype)[6:]}, the weight {how}", "product",
                _scale_as(dtype, kept))
        for dtype in (BRAIN, HALF)
        for kept, how in ((True, "too"), (False, "not"))
    ),
    Mistake("adapter_minus_one_indexed", "the last adapter", "ids",
            lambda ids, count, earlier: torch.where(ids < 0, count - 1, ids)),
    Mistake("adapter_minus_one_indexed", "the first adapter", "ids",
            lambda ids, count, earlier: ids.clamp(min=0)),
    Mistake("masked_by_multiplication", "every adapter's delta times 0 or 1", "added",
            _all_multiplied),
    Mistake("masked_by_multiplication", "every adapter applied to inputs times 0 or 1", "added",
            _inputs_zeroed),
    Mistake("masked_by_multiplication", "the first adapter's delta times 0 for -1", "added",
            _multiplied_for_none(0)),
    Mistake("masked_by_multiplication", "the last adapter's delta times 0 for -1", "added",
            _multiplied_for_none(-1)),
    Mistake("scaling_missing", "1", "scaling", torch.ones_like),
    Mistake("scaling_twice", "squared", "scaling", torch.square),
    *(Mistake("slices_swapped", f"in the order {o}", "starts", _starts(o)) for o in ORDERS),
    *(
        Mistake("tail_lost", f"{what} beyond a multiple of {n}", step, _without_last(n, 1))
        for step, what in (("inputs", "inputs"), ("reach", "inputs of the adapters"))
        for n in (8, 16, 32, 64, 128)
    ),
    *(
        Mistake("tail_lost", f"inputs of the base beyond a multiple of {n}", "columns",
                _without_tail(n))
        for n in (8, 16, 32, 64, 128)
    ),
    *(
        Mistake("tail_lost", f"{what} beyond a multiple of {n}", "outputs",
                _without_last(n, dim))
        for dim, what in ((1, "outputs"), (0, "tokens"))
        for n in (4, 8, 16, 32, 64, 128)
    ),
    Mistake("stale_adapter_ids", "those of the call before", "ids",
            lambda ids, count, earlier: ids if earlier is None else earlier),
)  # fmt: skip
"""Every variant, in the order in which they are tried: that of ``IDENTIFIERS``."""
