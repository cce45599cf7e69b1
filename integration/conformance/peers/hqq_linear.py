"""HQQ's linear with given codes, scales and zero-points, in its backend for every device.

Source: ``Quantizer.dequantize`` and ``HQQLinear`` of ``hqq/core/quantize.py`` of hqq 0.2.8: groups
along ``axis=1`` that are multiples of 8, zero-points and scales in the compute dtype.
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
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["HqqLinear"]


class HqqLinear:
    """``HQQLinear`` in the backend PYTORCH."""

    manifest = Manifest(
        scale_dtype_of_x=True,
        groups=(0, 8, 16, 32, 64, 128, 256),
        strategies=("group", "channel"),
        g_idx=False,
        in_multiple=8,
        base_rounded=True,
    )

    def __init__(self) -> None:
        self._quantize = importlib.import_module("hqq.core.quantize")

    def prepare(self, weight: PackedWeight) -> Any:
        """Return a linear with the weight."""
        group, dtype = group_size_of(weight), weight.scale.dtype
        config = self._quantize.BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
        layer: Any = self._quantize.HQQLinear(
            None, config, compute_dtype=dtype, device="cpu", initialize=False
        )
        codes = unsigned_codes(weight).to(torch.uint8).reshape(-1, group)
        packing = self._quantize.Quantizer.bit_to_packing[4]
        layer.W_q = self._quantize.Quantizer.pack[packing](codes)
        layer.meta = {
            "nbits": 4,
            "group_size": group,
            "shape": torch.Size(weight.shape),
            "scale": weight.scale.reshape(-1, 1),
            "zero": unsigned_zero_points(weight).to(dtype).reshape(-1, 1),
            "axis": 1,
            "packing": packing,
            "unpack_view_dtype": self._quantize.Quantizer.unpack_view_dtype[packing],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
        }
        layer.ready = True
        return layer

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dequantised weight of the linear."""
        dense: Tensor = self.prepare(weight).dequantize()
        return dense if dtype is None else dense.to(dtype)

    def int4_linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return the forward of the linear."""
        weight.bias = bias
        with torch.no_grad():
            y: Tensor = weight(x)
        return y
