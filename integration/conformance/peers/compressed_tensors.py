"""compressed-tensors' decompression, followed by a product in the dtype of x.

Source: ``compressed_tensors/compressors/pack_quantized/base.py``.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn.functional import linear

from int4_lora.integration.checkpoint.compressed_tensors import decompress_tensors
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["CompressedTensors", "stored_weight", "weights_arguments"]


class CompressedTensors:
    """``decompress``, then ``torch.nn.functional.linear``."""

    manifest = Manifest(scale_dtype_of_x=True, base_rounded=True, g_idx=True)

    def __init__(self) -> None:
        self._classes = importlib.import_module("compressed_tensors.quantization")

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that compressed-tensors decompresses."""
        arguments = self._classes.QuantizationArgs(**weights_arguments(weight))
        scheme = self._classes.QuantizationScheme(targets=["Linear"], weights=arguments)
        dense = decompress_tensors(stored_weight(weight), scheme)
        return dense if dtype is None else dense.to(dtype)

    def int4_linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
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
