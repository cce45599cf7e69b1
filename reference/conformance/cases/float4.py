"""Cases of FP4 weights: what their bits mean, in a weight and in a product.

Source: ``docs/format.md``, "FP4".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from int4_lora.reference import Float4Weight
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.format import FLOATS
from int4_lora.reference.conformance.cases.operands import (
    Operands,
    adapters,
    float4_weight,
    tokens,
)
from int4_lora.reference.float4 import pack_float4

__all__ = ["float4_cases"]

SCALES = {"nvfp4": "groups of 16, E4M3 scales over a global scale", "mxfp4": "groups of 32, E8M0"}
Make = Callable[[Draws], Operands]


def float4_cases() -> Iterator[Case]:
    """Yield the cases of FP4 weights."""
    for name, scales in SCALES.items():
        yield _weight_case(name, f"c * s, rounded once: {scales}", _random(name), quick=True)
        yield _weight_case(
            f"{name}_all_scales",
            f"every code with every scale, NaN and signs of zero among them: {scales}",
            _every_code_and_scale(name),
            quick=True,
        )
        yield from _layer_cases(name, scales)
    yield _weight_case(
        "nvfp4_without_global_scale", "E4M3 scales alone", lambda draws: _without_global(draws)
    )
    yield _weight_case(
        "nvfp4_global_scale_of_zero",
        "a global scale of 0: infinite, and NaN where a code is 0",
        lambda draws: _over_zero(draws),
    )


def _weight_case(name: str, exercises: str, make: Make, *, quick: bool = False) -> Case:
    return Case(f"dequantize/{name}/bf16", exercises, "dequantize", make, quick=quick)


def _layer_cases(name: str, scales: str) -> Iterator[Case]:
    for short, dtype in {**FLOATS, "fp64": torch.float64}.items():
        yield Case(
            f"int4_linear/{name}/{short}",
            f"a product with an FP4 weight, {scales}"
            + (", which float64 leaves unrounded" if short == "fp64" else ""),
            "int4_linear",
            _layer(name, dtype, count=16),
            quick=short == "bf16",
        )
    yield Case(
        f"int4_linear/{name}_token/bf16",
        f"one token with an FP4 weight, {scales}",
        "int4_linear",
        _layer(name, torch.bfloat16, count=1),
    )
    yield Case(
        f"int4_lora_linear/on_{name}/bf16",
        f"adapters on an FP4 weight, {scales}",
        "int4_lora_linear",
        _adapted(name),
        quick=True,
    )


def _random(name: str) -> Make:
    return lambda draws: Operands(weight=float4_weight(draws, name))


def _layer(name: str, dtype: torch.dtype, count: int) -> Make:
    return lambda draws: Operands(
        x=tokens(draws, count, dtype=dtype), weight=float4_weight(draws, name)
    )


def _adapted(name: str) -> Make:
    return lambda draws: Operands(
        x=tokens(draws),
        weight=float4_weight(draws, name),
        lora=adapters(draws),
        adapter_ids=draws.integers("ids", (16,), -1, 2),
    )


def _every_code_and_scale(name: str) -> Make:
    def make(draws: Draws) -> Operands:
        size = 16 if name == "nvfp4" else 32
        codes = (torch.arange(size) + draws.integers("first", (256, 1), 0, 15)) % 16
        scale = draws.permutation("scales", 256).to(torch.uint8)[:, None]
        if name == "mxfp4":
            return Operands(weight=Float4Weight(pack_float4(codes.byte()), scale, (256, size)))
        like = float4_weight(draws, name)
        e4m3 = scale.view(torch.float8_e4m3fn)
        packed = pack_float4(codes.byte())
        return Operands(weight=Float4Weight(packed, e4m3, (256, size), like.global_scale))

    return make


def _without_global(draws: Draws) -> Operands:
    weight = float4_weight(draws, "nvfp4")
    return Operands(weight=Float4Weight(weight.packed, weight.scale, weight.shape))


def _over_zero(draws: Draws) -> Operands:
    weight = float4_weight(draws, "nvfp4")
    return Operands(weight=Float4Weight(weight.packed, weight.scale, weight.shape, torch.zeros(1)))
