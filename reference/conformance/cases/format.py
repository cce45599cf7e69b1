"""Cases of the format: what the bits mean.

Source: ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, pack
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.operands import Operands, weight

__all__ = ["FLOATS", "WEIGHTS", "format_cases"]

FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# name: (what it exercises, arguments of ``weight``, whether it is quick)
WEIGHTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "group_128": ("groups of 128 columns", {"groups": 2}, True),
    "group_128_asym": ("zero-points, packed along dim 0", {"groups": 2, "symmetric": False}, True),
    "group_64": ("groups of 64 columns", {"groups": 4}, False),
    "group_32": ("groups of 32 columns", {"groups": 8}, False),
    "group_32_asym": ("groups of 32 with zero-points", {"groups": 8, "symmetric": False}, True),
    "channel": ("one scale for a row", {"groups": 1}, True),
    "channel_asym": (
        "one scale and zero-point for a row",
        {"groups": 1, "symmetric": False},
        False,
    ),
    "tensor_asym": ("one scale for the weight", {"strategy": "tensor", "symmetric": False}, False),
    "block_asym": ("scales of blocks", {"strategy": "block", "symmetric": False}, False),
    "ragged": (
        "13 rows of 44 columns in 4 groups: no multiple of 8",
        {"rows": 13, "columns": 44, "groups": 4},
        True,
    ),
    "ragged_asym": (
        "13 rows of 44 columns in 4 groups, with zero-points in a last word that is not full",
        {"rows": 13, "columns": 44, "groups": 4, "symmetric": False},
        True,
    ),
    "ragged_channel": (
        "21 rows of 77 columns: the last word of a row is not full",
        {"rows": 21, "columns": 77, "groups": 1},
        False,
    ),
    "columns_330_asym": (
        "24 rows of 330 columns in 2 groups: wide, and no multiple of 4",
        {"rows": 24, "columns": 330, "groups": 2, "symmetric": False},
        True,
    ),
    "columns_1096": (
        "16 rows of 1096 columns: wide, and no multiple of 16",
        {"rows": 16, "columns": 1096, "groups": 1},
        False,
    ),
    "g_idx": (
        "columns of a group are not beside each other",
        {"groups": 8, "g_idx": "balanced"},
        True,
    ),
    "g_idx_asym": (
        "g_idx with zero-points",
        {"groups": 8, "g_idx": "balanced", "symmetric": False},
        False,
    ),
    "g_idx_unbalanced": (
        "groups of different numbers of columns",
        {"groups": 8, "g_idx": "unbalanced"},
        True,
    ),
    "g_idx_minus_one": (
        "a -1 in g_idx means column order",
        {"groups": 8, "g_idx": "minus_one"},
        True,
    ),
}


def format_cases() -> Iterator[Case]:
    """Yield the cases of ``pack``, ``unpack`` and ``dequantize``."""
    yield from _packing_cases()
    for name, (exercises, arguments, quick) in WEIGHTS.items():
        for short, dtype in FLOATS.items():
            yield Case(
                f"dequantize/{name}/{short}",
                f"(q - z) * s, rounded once: {exercises}",
                "dequantize",
                _dequantized(dtype, arguments),
                quick=quick and short != "fp32",
            )
    for name, short in (("fp16", "fp32"), ("fp32", "fp16"), ("bf16", "fp16")):
        yield Case(
            f"dequantize/cast/{name}_to_{short}",
            "rounded to the scale's dtype, then cast",
            "dequantize",
            _dequantized(FLOATS[name], {"symmetric": False}, FLOATS[short]),
        )
    for short, dtype in FLOATS.items():
        yield from _scales_of_all_kinds(short, dtype)
    yield Case(
        "dequantize/non_contiguous/bf16",
        "tensors that are views with strides",
        "dequantize",
        lambda draws: Operands(weight=strided(weight(draws, symmetric=False))),
    )


def _scales_of_all_kinds(short: str, dtype: torch.dtype) -> Iterator[Case]:
    yield Case(
        f"dequantize/all_codes/{short}",
        "every code with every zero-point, at scales of all sizes",
        "dequantize",
        _every_code_and_zero_point(dtype),
        quick=True,
    )
    yield Case(
        f"dequantize/special_scales/{short}",
        "scales that are zero, negative, subnormal, infinite and NaN; signs of zero count",
        "dequantize",
        _special_scales(dtype),
        quick=True,
    )


def _packing_cases() -> Iterator[Case]:
    shapes = {
        "all_codes": ("every code in every place of a word", (16, 128), 1, True),
        "ragged": ("a last word that is not full", (5, 13), 1, True),
        "one_column": ("a row shorter than a word", (3, 1), 1, False),
        "zero_points": ("packed along dim 0", (21, 6), 0, True),
        "wide": ("many words", (64, 1024), 1, False),
    }
    for name, (exercises, shape, dim, quick) in shapes.items():
        codes = _codes(shape)
        yield Case(f"pack/{name}", exercises, "pack", _to_pack(codes, dim), quick=quick)
        yield Case(f"unpack/{name}", exercises, "unpack", _to_unpack(codes, dim), quick=quick)
    yield Case(
        "unpack/non_contiguous",
        "words that are a view with strides",
        "unpack",
        lambda draws: Operands(packed=spread(pack(_codes((9, 40))(draws))), size=40, dim=1),
    )


def _codes(shape: tuple[int, int]) -> Callable[[Draws], Tensor]:
    def make(draws: Draws) -> Tensor:
        if shape == (16, 128):  # shifted from row to row, so that each code is in each place
            column = torch.arange(128)
            return (((column // 8 + column + torch.arange(16)[:, None]) % 16) - 8).to(torch.int8)
        return draws.integers("codes", shape, -8, 7).to(torch.int8)

    return make


def _to_pack(codes: Callable[[Draws], Tensor], dim: int) -> Callable[[Draws], Operands]:
    return lambda draws: Operands(codes=codes(draws), dim=dim)


def _to_unpack(codes: Callable[[Draws], Tensor], dim: int) -> Callable[[Draws], Operands]:
    def make(draws: Draws) -> Operands:
        unpacked = codes(draws)
        return Operands(packed=pack(unpacked, dim=dim), size=unpacked.shape[dim], dim=dim)

    return make


def _dequantized(
    dtype: torch.dtype, arguments: dict[str, Any], to: torch.dtype | None = None
) -> Callable[[Draws], Operands]:
    return lambda draws: Operands(
        weight=weight(draws, dtype=dtype, **arguments),
        dtype=to,
    )


def _every_code_and_zero_point(dtype: torch.dtype) -> Callable[[Draws], Operands]:
    def make(draws: Draws) -> Operands:
        codes = (torch.arange(128) % 16 - 8).repeat(64, 1).to(torch.int8)
        zero_point = (torch.arange(64 * 8).reshape(64, 8) % 16 - 8).to(torch.int8)
        powers = draws.integers("powers", (64, 8), -6, 6).to(torch.float64)
        scale = ((1 + draws.uniform("scale", (64, 8))) * 2.0**powers).to(dtype)
        return Operands(
            weight=PackedWeight(
                pack(codes), scale, shape=(64, 128), zero_point=pack(zero_point, dim=0)
            )
        )

    return make


def _special_scales(dtype: torch.dtype) -> Callable[[Draws], Operands]:
    def make(draws: Draws) -> Operands:
        return Operands(weight=special(weight(draws, 64, 128, symmetric=False, dtype=dtype)))

    return make


def special(weight: PackedWeight) -> PackedWeight:
    """Return the weight, of two groups or more, with scales of every class in some rows."""
    scale = weight.scale.clone()
    tiny = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}.get(scale.dtype, 2.0**-149)
    large = 5000.0 if scale.dtype == torch.float16 else 2.0**126
    values = [0.0, -0.0, -0.03, tiny, -3 * tiny, float("inf"), float("-inf"), float("nan"), large]
    for row, value in enumerate(values):
        scale[2 * row, row % scale.shape[1]] = value
    return replace(weight, scale=scale)


def strided(weight: PackedWeight) -> PackedWeight:
    """Return the same weight in tensors that are not contiguous."""
    zero_point = None if weight.zero_point is None else spread(weight.zero_point)
    return replace(
        weight, packed=spread(weight.packed), scale=spread(weight.scale), zero_point=zero_point
    )


def spread(tensor: Tensor) -> Tensor:
    """Return the same values as every second column of a wider tensor."""
    wide = tensor.repeat_interleave(2, dim=-1)
    wide[..., 1::2] = 0 if not tensor.is_floating_point() else float("nan")
    return wide[..., ::2]
