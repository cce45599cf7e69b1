"""AutoRound's linear for every device, which dequantises GPTQ's layout.

Source: ``QuantLinear`` of ``auto_round_extension/torch/qlinear_torch.py`` of auto-round 0.16:
scales in float16, sizes that are multiples of 32, a g_idx.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.unsigned import (
    group_size_of,
    unsigned_codes,
    unsigned_zero_points,
)
from int4_lora.reference import PackedWeight, pack
from int4_lora.reference.conformance import Manifest

__all__ = ["AutoRoundTorch"]

OFFSET = 8  # the signed codes that ``pack`` takes


class AutoRoundTorch:
    """``QuantLinear`` of the backend ``auto_round:torch``."""

    manifest = Manifest(
        dtypes=(torch.float16, torch.float32),
        scale_dtypes=(torch.float16,),
        strategies=("group", "channel"),
        in_multiple=32,
        out_multiple=32,
        base_rounded=True,
    )

    def __init__(self) -> None:
        self._linear = importlib.import_module("auto_round_extension.torch.qlinear_torch")

    def prepare(self, weight: PackedWeight) -> Any:
        """Return a linear with the weight in GPTQ's layout."""
        rows, columns = weight.shape
        ordered = weight.g_idx is not None and bool((weight.g_idx >= 0).all())  # GPTQ has no -1
        layer: Any = self._linear.QuantLinear(
            4, group_size_of(weight), columns, rows, bias=False, g_idx=ordered
        )
        zero_points = unsigned_zero_points(weight).t()
        layer.qweight = _words(unsigned_codes(weight).t(), dim=0)  # [in / 8, out]
        layer.qzeros = _words(zero_points, dim=1)  # [groups, out / 8]
        layer.scales = weight.scale.t().contiguous()
        if ordered:
            layer.g_idx = weight.g_idx
        return layer

    def int4_linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return the forward of the linear."""
        weight.bias = bias
        y: Tensor = weight(x)
        return y


def _words(values: Tensor, *, dim: int) -> Tensor:
    return pack((values - OFFSET).to(torch.int8).contiguous(), dim=dim)
