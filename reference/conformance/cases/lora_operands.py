"""Layers with adapters, as the cases call them.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight, pack
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.format import special, spread, strided
from int4_lora.reference.conformance.cases.operands import Operands, adapters, tokens, weight

__all__ = [
    "base_overflows",
    "exact",
    "mixed_ids",
    "one_part",
    "same_but_scaling",
    "special_tokens",
    "special_weight",
    "strided_layer",
    "unused_not_finite",
    "with_adapters",
]

Lora = LoRAStack | Sequence[LoRASlice]


def mixed_ids(draws: Draws, count: int, adapters_count: int) -> Tensor:
    """Return ids that use every adapter and -1, if there are tokens enough: int64 ``[count]``."""
    order = draws.permutation("ids", count)
    return order % (adapters_count + 1) - 1


def with_adapters(
    dtype: torch.dtype,
    *,
    count: int = 16,
    rows: int = 64,
    columns: int = 256,
    rank: int = 8,
    adapters_count: int = 3,
    lora_dtype: torch.dtype | None = None,
    ids: Callable[[Draws], Tensor] | None = None,
    slices: Sequence[tuple[str, int, int]] | None = None,
    bias: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Callable[[Draws], Operands]:
    """Return what makes a layer with adapters; see ``operands.weight`` for the arguments."""

    def make(draws: Draws) -> Operands:
        def stack(height: int, what: str, smaller: int = 0) -> LoRAStack:
            kind, own = lora_dtype or dtype, rank - smaller
            return adapters(
                draws, height, columns, count=adapters_count, rank=own, dtype=kind, what=what
            )

        lora: Lora = stack(rows, "lora")
        if slices is not None:  # each of a rank and scalings of its own
            lora = [
                LoRASlice(stack(height, name, index), start)
                for index, (name, start, height) in enumerate(slices)
            ]
        return Operands(
            x=tokens(draws, count, columns, dtype),
            weight=weight(draws, rows, columns, dtype=scale_dtype or dtype, **arguments),
            lora=lora,
            adapter_ids=mixed_ids(draws, count, adapters_count) if ids is None else ids(draws),
            bias=None if bias is None else draws.normal("bias", (rows,)).to(bias),
        )

    return make


def one_part(
    function: str,
    dtype: torch.dtype,
    rank: int,
    mixed: bool,
    *,
    rows: int = 64,
    columns: int = 256,
    count: int = 16,
    adapters_count: int = 3,
    id_dtype: torch.dtype = torch.int64,
) -> Callable[[Draws], Operands]:
    """Return what makes the operands of ``shrink`` or ``expand``."""

    def make(draws: Draws) -> Operands:
        stack = adapters(draws, rows, columns, count=adapters_count, dtype=dtype, rank=rank)
        ids = mixed_ids(draws, count, adapters_count) if mixed else torch.full((count,), -1)
        ids = ids.to(id_dtype)
        if function == "shrink":
            x = tokens(draws, count, columns, dtype)
            return Operands(x=x, lora=stack, adapter_ids=ids)
        h = draws.normal("h", (count, rank)).to(torch.float32)
        return Operands(h=h, lora=stack, adapter_ids=ids)

    return make


def exact(draws: Draws, dtype: torch.dtype) -> Operands:
    """Return a layer whose base, delta and sums are all small integers over a power of two."""
    codes = draws.integers("codes", (64, 128), -2, 2).to(torch.int8)
    scale = (2.0 ** draws.integers("scale", (64, 2), -1, 1).to(torch.float64)).to(dtype)
    x = torch.zeros(16, 128, dtype=torch.float64)
    x.scatter_(1, draws.integers("where", (16, 4), 0, 127), 1.0)
    a = draws.integers("a", (3, 4, 128), -1, 1).to(dtype)
    b = draws.integers("b", (3, 64, 4), -1, 1).to(dtype)
    return Operands(
        x=x.to(dtype),
        weight=PackedWeight(pack(codes), scale, shape=(64, 128)),
        lora=LoRAStack(a, b, torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)),
        adapter_ids=mixed_ids(draws, 16, 3),
    )


def same_but_scaling(draws: Draws) -> Operands:
    """Return a layer whose adapters have the same A and B, and scalings of their own."""
    made = with_adapters(torch.bfloat16)(draws)
    stack = made.slices[0].stack
    same = LoRAStack(stack.a[:1].repeat(3, 1, 1), stack.b[:1].repeat(3, 1, 1), stack.scaling)
    return dataclasses.replace(made, lora=same)


def unused_not_finite(draws: Draws) -> Operands:
    """Return a layer whose second adapter has a NaN and an infinity, and that no token uses."""
    made = with_adapters(torch.bfloat16)(draws)
    stack = made.slices[0].stack
    a, b = stack.a.clone(), stack.b.clone()
    a[1, 0, 0] = float("nan")
    b[1, 3, 0] = float("inf")
    ids = made.adapter_ids
    ids = torch.where(ids == 1, 2, ids) if ids is not None else None
    return dataclasses.replace(made, lora=LoRAStack(a, b, stack.scaling), adapter_ids=ids)


def base_overflows(draws: Draws) -> Operands:
    """Return a layer whose first outputs have the base 256 * 7 * 40, and a delta of minus half."""
    codes = draws.integers("codes", (64, 256), -8, 7).to(torch.int8)
    codes[:8] = 7
    scale = torch.full((64, 2), 0.05, dtype=torch.float16)
    scale[:8] = 40.0
    x = torch.ones(16, 256, dtype=torch.float16)
    a = torch.full((1, 1, 256), 1.0, dtype=torch.float16)
    b = torch.zeros(1, 64, 1, dtype=torch.float16)
    b[0, :8] = -140.0
    return Operands(
        x=x,
        weight=PackedWeight(pack(codes), scale, shape=(64, 256)),
        lora=LoRAStack(a, b, torch.tensor([1.0], dtype=torch.float64)),
        adapter_ids=torch.zeros(16, dtype=torch.int64),
    )


def special_tokens(draws: Draws) -> Operands:
    """Return a layer with a NaN in one token and an infinity in another."""
    made = with_adapters(torch.bfloat16)(draws)
    x = tokens(draws)
    x[3, 17], x[5, 100] = float("nan"), float("inf")
    return dataclasses.replace(made, x=x)


def special_weight(draws: Draws) -> Operands:
    """Return a layer whose scales are of every class."""
    made = with_adapters(torch.bfloat16)(draws)
    return dataclasses.replace(made, weight=special(weight(draws)))


def strided_layer(draws: Draws) -> Operands:
    """Return a layer whose x, ids, bias and weight are views with strides."""
    made = with_adapters(torch.bfloat16, bias=torch.bfloat16)(draws)
    changed: dict[str, Any] = {
        name: spread(value)
        for name in ("x", "adapter_ids", "bias")
        if (value := getattr(made, name)) is not None
    }
    return dataclasses.replace(made, weight=strided(weight(draws)), **changed)
