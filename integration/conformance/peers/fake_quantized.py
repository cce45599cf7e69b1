"""llm-compressor's fake-quantised forward, which is compressed-tensors'.

While llm-compressor calibrates, a module keeps its dense weight, and each forward quantises and
dequantises it. Here the dense weight is the one that the packed weight stands for.

Source: ``set_forward_quantized`` of ``compressed_tensors/quantization/lifecycle/forward.py`` of
compressed-tensors 0.17; the strategies are those of its ``QuantizationStrategy`` for weights.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.compressed_tensors import weights_arguments
from int4_lora.integration.conformance.peers.unsigned import int8_zero_points
from int4_lora.reference import PackedWeight, dequantize
from int4_lora.reference.conformance import Manifest

__all__ = ["FakeQuantized"]


class FakeQuantized:
    """A ``torch.nn.Linear`` with ``set_forward_quantized``."""

    manifest = Manifest(scale_dtype_of_x=True, finite_scales=True, base_rounded=True)

    def __init__(self) -> None:
        self._classes = importlib.import_module("compressed_tensors.quantization")
        self._forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")

    def prepare(self, weight: PackedWeight) -> torch.nn.Linear:
        """Return a linear in calibration, with the dense weight and its quantisation."""
        rows, columns = weight.shape
        module = torch.nn.Linear(columns, rows, bias=False, dtype=weight.scale.dtype)
        module.weight.data = dequantize(weight)
        arguments = self._classes.QuantizationArgs(**weights_arguments(weight))
        module.quantization_scheme = self._classes.QuantizationScheme(
            targets=["Linear"], weights=arguments
        )
        module.quantization_status = self._classes.QuantizationStatus.CALIBRATION
        module.weight_scale = weight.scale
        module.weight_zero_point = _zero_points(weight)
        if weight.g_idx is not None:
            module.weight_g_idx = weight.g_idx
        self._forward.set_forward_quantized(module)
        return module

    def int4_linear(self, x: Tensor, weight: torch.nn.Linear, bias: Tensor | None = None) -> Tensor:
        """Return the fake-quantised forward."""
        with torch.no_grad():
            y: Tensor = weight(x)
        return y if bias is None else (y + bias).to(x.dtype)


def _zero_points(weight: PackedWeight) -> Tensor:
    if weight.strategy in ("channel", "group"):
        return int8_zero_points(weight)
    return torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point
