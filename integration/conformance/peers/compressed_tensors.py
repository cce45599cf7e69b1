"""compressed-tensors' decompression, followed by a product in the dtype of x.

FP4 is decompressed to bfloat16 in two roundings, and a scale of 255 of MXFP4 to an infinity.

Source: ``compressed_tensors/compressors/pack_quantized/base.py``, ``nvfp4/base.py``,
``mxfp4/base.py``.
"""

from __future__ import annotations

import dataclasses
import importlib

import torch
from torch import Tensor
from torch.nn.functional import linear

from int4_lora.integration.checkpoint.compressed_tensors import decompress_tensors
from int4_lora.reference import Float4Weight, PackedWeight
from int4_lora.reference.conformance import Manifest
from int4_lora.reference.float4_weight import BaseWeight

__all__ = ["CompressedTensors", "stored_weight", "weights_arguments"]


class CompressedTensors:
    """``decompress``, then ``torch.nn.functional.linear``."""

    manifest = Manifest(
        formats=("int4", "nvfp4", "mxfp4"), scale_dtype_of_x=True, base_rounded=True, g_idx=True
    )

    def __init__(self) -> None:
        self._classes = importlib.import_module("compressed_tensors.quantization")

    def dequantize(self, weight: BaseWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that compressed-tensors decompresses."""
        if isinstance(weight, Float4Weight):
            return self._dequantize_float4(weight, torch.bfloat16 if dtype is None else dtype)
        arguments = self._classes.QuantizationArgs(**weights_arguments(weight))
        scheme = self._classes.QuantizationScheme(targets=["Linear"], weights=arguments)
        dense = decompress_tensors(stored_weight(weight), scheme)
        return dense if dtype is None else dense.to(dtype)

    def _dequantize_float4(self, weight: Float4Weight, dtype: torch.dtype) -> Tensor:
        if weight.format == "nvfp4" and weight.global_scale is None:
            weight = dataclasses.replace(weight, global_scale=torch.ones(1))  # it needs one
        scheme = self._classes.preset_name_to_scheme(f"{weight.format.upper()}A16", ["Linear"])
        stored = {"weight_packed": weight.packed, "weight_scale": weight.scale}
        if weight.global_scale is not None:
            stored["weight_global_scale"] = weight.global_scale
        return decompress_tensors(stored, scheme, f"{weight.format}-pack-quantized").to(dtype)

    def int4_linear(self, x: Tensor, weight: BaseWeight, bias: Tensor | None = None) -> Tensor:
        """Return the product in the dtype of x."""
        bias = None if bias is None else bias.to(x.dtype)
        return linear(x, self.dequantize(weight, x.dtype), bias)


def weights_arguments(weight: PackedWeight) -> dict[str, object]:
    """Return the ``weights`` of the config group that describes a weight."""
    arguments: dict[str, object] = {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": weight.strategy,
    }
    if weight.strategy == "group":
        arguments["group_size"] = weight.in_features // weight.scale.shape[1]
    if weight.strategy == "block" and isinstance(weight.group_size, tuple):
        arguments["block_structure"] = list(weight.group_size)
    if weight.g_idx is not None:
        arguments["actorder"] = "group"
    return arguments


def stored_weight(weight: PackedWeight) -> dict[str, Tensor]:
    """Return the tensors of a weight by their names in a checkpoint."""
    tensors = {
        "weight_packed": weight.packed,
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zero_point is not None:
        tensors["weight_zero_point"] = weight.zero_point
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors
