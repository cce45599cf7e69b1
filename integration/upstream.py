"""compressed-tensors' own decompression, as the second opinion on every weight.

Source: ``compressed_tensors/compressors/pack_quantized/base.py``.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from int4_lora.integration.checkpoint import Checkpoint

__all__ = ["decompress"]

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


def decompress(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the dense weight of one module as compressed-tensors itself computes it.

    Args:
        checkpoint: an open checkpoint.
        name: one of its quantised modules.

    Returns:
        ``[out_features, in_features]`` in the scale's dtype.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: no such module or tensor.
    """
    compressors = importlib.import_module("compressed_tensors.compressors.pack_quantized.base")
    tensors = {
        part: checkpoint.tensor(f"{name}.{part}")
        for part in PARTS
        if f"{name}.{part}" in checkpoint.tensors
    }
    compressor = compressors.PackedQuantizationCompressor
    dense: Tensor = compressor.decompress(tensors, checkpoint.schemes[name].upstream)["weight"]
    return dense
