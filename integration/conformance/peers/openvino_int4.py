"""OpenVINO's INT4 weights on a CPU, with 16-bit activations.

The graph is the one that NNCF writes: codes and zero-points of 4 bits, converted, subtracted,
multiplied by the scales, reshaped, and multiplied. Quantisation of the activations, which the
plug-in for CPUs does unless it is told otherwise, is switched off.

Source: "LLM Weight Compression" in OpenVINO's documentation, and
``ov::hint::dynamic_quantization_group_size`` of OpenVINO 2026.4.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.unsigned import (
    group_size_of,
    nibbles,
    unsigned_codes,
    unsigned_zero_points,
)
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["OpenVinoInt4"]


class OpenVinoInt4:
    """A compiled model with one linear, on the device "CPU"."""

    manifest = Manifest(
        dtypes=(torch.float32,),
        strategies=("group", "channel"),
        scale_dtypes=(torch.float16, torch.float32),
        g_idx=False,
        in_multiple=2,
        weight_rounded=False,
    )

    def __init__(self) -> None:
        self._ov = importlib.import_module("openvino")
        self._opset = importlib.import_module("openvino.opset13")

    def prepare(self, weight: PackedWeight) -> Any:
        """Return a compiled model whose input is x."""
        rows, columns = weight.shape
        groups, group = weight.scale.shape[1], group_size_of(weight)
        half = weight.scale.dtype == torch.float16
        scale_type = self._ov.Type.f16 if half else self._ov.Type.f32
        codes = self._opset.convert(
            self._nibbles(unsigned_codes(weight), [rows, groups, group]), scale_type
        )
        zero_points = self._opset.convert(
            self._nibbles(unsigned_zero_points(weight).reshape(1, -1), [rows, groups, 1]),
            scale_type,
        )
        scale = self._opset.constant(weight.scale.reshape(rows, groups, 1).numpy())
        grouped = self._opset.multiply(self._opset.subtract(codes, zero_points), scale)
        dense = self._opset.convert(
            self._opset.reshape(grouped, [rows, columns], special_zero=False), self._ov.Type.f32
        )
        x = self._opset.parameter([-1, columns], self._ov.Type.f32)
        model = self._ov.Model([self._opset.matmul(x, dense, False, True)], [x], "linear")
        settings = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "INFERENCE_NUM_THREADS": 1,
                    "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
        return self._ov.compile_model(model, "CPU", settings)

    def int4_linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Return the model's result."""
        y = torch.from_numpy(weight(x.contiguous().numpy())[0].copy())
        return y if bias is None else (y + bias).to(x.dtype)

    def _nibbles(self, values: Tensor, shape: list[int]) -> Any:
        data = nibbles(values).reshape(-1).numpy()
        tensor = self._ov.Tensor(data, self._ov.Shape(shape), self._ov.Type.u4)
        return self._ov.op.Constant(tensor, shared_memory=False)
