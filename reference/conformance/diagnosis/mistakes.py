"""The mistakes that INT4 + LoRA code has had, each as one replaced step of the definition.

A name may have several variants: what people get wrong under one heading is done in more than one
way, and a mistake is named only where one of its variants reproduces the result.

Source: ``docs/conformance.md``, which says where each was met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch

from int4_lora.reference.conformance.diagnosis.definition_steps import Way
from int4_lora.reference.conformance.diagnosis.wrong_steps import (
    axis_of_words,
    axis_transposed,
    column_order,
    cut_evenly,
    groups_reversed,
    groups_sorted,
    permuted,
    rounded_apart,
    rounded_apart_kept,
    rounded_offset,
    scale_as,
    starts,
    top_without_mask,
    without_last,
    without_mask,
    without_tail,
)

__all__ = ["IDENTIFIERS", "MISTAKES", "Mistake"]

IDENTIFIERS = (
    "nibble_order",
    "offset",
    "sign_extension",
    "zero_point_sign",
    "zero_point_axis",
    "zero_point_plus_one",
    "groups_reversed",
    "g_idx_ignored",
    "g_idx_column_order",
    "round_before_subtract",
    "scale_rounded",
    "low_precision_accumulate",
    "adapter_minus_one_indexed",
    "scaling_missing",
    "scaling_twice",
    "slices_swapped",
    "tail_lost",
    "stale_adapter_ids",
    "unknown",
)
"""Every name that a diagnosis can give."""


@dataclass(frozen=True)
class Mistake:
    """One way of doing one step wrong.

    Args:
        name: one of ``IDENTIFIERS``.
        variant: what exactly, in words.
        step: the field of ``Way`` that is replaced.
        wrong: what it is replaced by.
    """

    name: str
    variant: str
    step: str
    wrong: Callable[..., Any]

    def within(self, way: Way) -> Way:
        """Return ``way`` with this mistake made."""
        changed: dict[str, Any] = {self.step: self.wrong}
        return replace(way, **changed)


HALF, BRAIN = torch.float16, torch.bfloat16
ORDERS = [o for count in (2, 3) for o in permutations(range(count)) if o != tuple(range(count))]

MISTAKES: tuple[Mistake, ...] = (
    Mistake("nibble_order", "the first code in the highest bits", "shifts",
            lambda: 4 * torch.arange(7, -1, -1, dtype=torch.int32)),
    Mistake("nibble_order", "the codes of each byte in the other order", "shifts",
            lambda: 4 * torch.tensor([1, 0, 3, 2, 5, 4, 7, 6], dtype=torch.int32)),
    *(
        Mistake("offset", f"q = u - {by}", "code", lambda stored, by=by: stored - by)
        for by in (7, 9, 0)
    ),
    Mistake("sign_extension", "no mask, cut to int8", "mask", without_mask(8)),
    Mistake("sign_extension", "no mask", "mask", without_mask(33)),
    Mistake("sign_extension", "no mask on the last code", "mask", top_without_mask),
    Mistake("sign_extension", "read as two's complement", "code",
            lambda stored: (stored ^ 8) - 8),
    Mistake("zero_point_sign", "q + z", "centre", lambda codes, zero: codes + zero),
    Mistake("zero_point_axis", "the table transposed", "zero_points", axis_transposed),
    Mistake("zero_point_axis", "packed along groups", "zero_points", axis_of_words),
    Mistake("zero_point_plus_one", "z + 1", "zero_points", lambda table, weight: table + 1),
    Mistake("zero_point_plus_one", "z - 1", "zero_points", lambda table, weight: table - 1),
    Mistake("groups_reversed", "the last group first", "group", groups_reversed),
    Mistake("g_idx_ignored", "groups in column order", "group", column_order),
    Mistake("g_idx_column_order", "g_idx sorted", "group", groups_sorted),
    Mistake("g_idx_column_order", "sorted by g_idx, cut into equal groups", "group",
            cut_evenly),
    Mistake("g_idx_column_order", "weights left sorted by group", "columns", permuted(False)),
    Mistake("g_idx_column_order", "weights sorted back that were not", "columns",
            permuted(True)),
    Mistake("round_before_subtract", "RN(RN(q s) - RN(z s))", "product", rounded_apart),
    Mistake("round_before_subtract", "RN(q s) - RN(z s)", "product", rounded_apart_kept),
    Mistake("round_before_subtract", "q s - RN(z s)", "product", rounded_offset),
    *(
        Mistake("scale_rounded", f"to {str(dtype)[6:]}, the weight {how}", "product",
                scale_as(dtype, kept))
        for dtype in (BRAIN, HALF)
        for kept, how in ((True, "too"), (False, "not"))
    ),
    Mistake("adapter_minus_one_indexed", "the last adapter", "ids",
            lambda ids, count, earlier: torch.where(ids < 0, count - 1, ids)),
    Mistake("adapter_minus_one_indexed", "the first adapter", "ids",
            lambda ids, count, earlier: ids.clamp(min=0)),
    Mistake("scaling_missing", "1", "scaling", torch.ones_like),
    Mistake("scaling_twice", "squared", "scaling", torch.square),
    *(Mistake("slices_swapped", f"in the order {o}", "starts", starts(o)) for o in ORDERS),
    *(
        Mistake("tail_lost", f"{what} beyond a multiple of {n}", step, without_last(n, 1))
        for step, what in (("inputs", "inputs"), ("reach", "inputs of the adapters"))
        for n in (8, 16, 32, 64, 128)
    ),
    *(
        Mistake("tail_lost", f"inputs of the base beyond a multiple of {n}", "columns",
                without_tail(n))
        for n in (8, 16, 32, 64, 128)
    ),
    *(
        Mistake("tail_lost", f"{what} beyond a multiple of {n}", "outputs",
                without_last(n, dim))
        for dim, what in ((1, "outputs"), (0, "tokens"))
        for n in (4, 8, 16, 32, 64, 128)
    ),
    Mistake("stale_adapter_ids", "those of the call before", "ids",
            lambda ids, count, earlier: ids if earlier is None else earlier),
)  # fmt: skip
"""Every variant, in the order in which they are tried: that of ``IDENTIFIERS``."""
