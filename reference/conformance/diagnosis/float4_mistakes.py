"""Mistakes in reading FP4 weights, each a wrong step of a ``Way``.

Source: ``docs/format.md``, "FP4". ggml keeps the values doubled and halves the scale, so that a
table or a bias copied alone is off by a factor of 2; compressed-tensors divides by the global
scale, where ModelOpt stores its reciprocal and multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import Float4Weight
from int4_lora.reference.conformance.diagnosis.definition_steps import (
    e2m1_values,
    float4_scale_values,
)

__all__ = ["FLOAT4_MISTAKES"]


def _high_nibble_first(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 0xF], dim=2).flatten(1)


def _two_s_complement(codes: Tensor) -> Tensor:
    wide = codes.to(torch.float64)
    return torch.where(wide >= 8, wide - 16, wide)


def _magnitude_as_number(codes: Tensor) -> Tensor:
    """Read the three low bits as a whole number."""
    size = (codes & 7).to(torch.float64)
    return torch.where(codes >= 8, -size, size)


def _biased_by(bias: int) -> Callable[[Float4Weight], Tensor]:
    """Return a step that reads E8M0 with another bias."""

    def scales(weight: Float4Weight) -> Tensor:
        right = float4_scale_values(weight)
        return right if weight.format == "nvfp4" else right * 2.0 ** (127 - bias)

    return scales


def _bytes_as_numbers(weight: Float4Weight) -> Tensor:
    return weight.scale.to(torch.float64)


# name: {what exactly is done wrong: (the step, what replaces it)}
FLOAT4_MISTAKES: dict[str, dict[str, tuple[str, Callable[..., Any]]]] = {
    "nibble_order": {
        "the even column in the high nibble": ("float4_codes", _high_nibble_first),
    },
    "fp4_sign": {
        "the sign left out": ("float4_values", lambda codes: e2m1_values(codes & 7)),
        "the other sign": ("float4_values", lambda codes: e2m1_values(codes ^ 8)),
    },
    "global_scale_missing": {
        "not divided": ("float4_global", lambda product, over: product),
    },
    "global_scale_multiplied": {
        "multiplied": ("float4_global", lambda product, over: product * over),
    },
    "e8m0_bias": {
        "2^(s - 126)": ("float4_scales", _biased_by(126)),
        "2^(s - 128)": ("float4_scales", _biased_by(128)),
        "the byte as a number": ("float4_scales", _bytes_as_numbers),
    },
    "fp4_table": {
        "two's complement": ("float4_values", _two_s_complement),
        "the magnitude as a whole number": ("float4_values", _magnitude_as_number),
        "half of that": ("float4_values", lambda codes: _magnitude_as_number(codes) / 2),
        "the values doubled": ("float4_values", lambda codes: e2m1_values(codes) * 2),
    },
}
"""Every name, and what exactly is done wrong under it."""
