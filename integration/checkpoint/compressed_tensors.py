"""compressed-tensors' own decompression, as the second opinion on every weight.

Source: ``compressed_tensors/compressors/pack_quantized/base.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from int4_lora.integration.checkpoint.open import Checkpoint

__all__ = [
    "PARTS",
    "decompress",
    "decompress_module",
    "decompress_tensors",
    "module_tensors",
    "stored_tensors",
]

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
        ValueError: no such module or tensor, or a file that cannot be read.
        Exception: whatever compressed-tensors raises.
    """
    return decompress_tensors(stored_tensors(checkpoint, name), checkpoint.schemes[name].upstream)


def stored_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Return the tensors of one module by their name within it."""
    return {
        part: checkpoint.tensor(f"{name}.{part}")
        for part in PARTS
        if f"{name}.{part}" in checkpoint.tensors
    }


def decompress_tensors(tensors: Mapping[str, Tensor], scheme: Any) -> Tensor:
    """Return what compressed-tensors makes of one module's tensors under its own scheme."""
    compressors = importlib.import_module("compressed_tensors.compressors.pack_quantized.base")
    compressor = compressors.PackedQuantizationCompressor
    dense: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return dense


def module_tensors(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the names, within a module of any format, of the tensors that hold its weight."""
    start = f"{name}."
    return sorted(
        full.removeprefix(start)
        for full in checkpoint.tensors
        if full.startswith(f"{start}weight") and "." not in full.removeprefix(start)
    )


def decompress_module(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the dense weight of a module of any format, as compressed-tensors computes it.

    Args:
        checkpoint: an open checkpoint.
        name: one of its quantised modules.

    Raises:
        ValueError: the installed compressed-tensors cannot decompress the format; the message
            names the module.
    """
    scheme = checkpoint.schemes[name]
    where = f"{checkpoint.path}: {name}"
    tensors = {
        part: checkpoint.tensor(f"{name}.{part}") for part in module_tensors(checkpoint, name)
    }
    try:
        base = importlib.import_module("compressed_tensors.compressors").BaseCompressor
        compressor = base.get_value_from_registry(scheme.format)
        dense: Tensor = compressor.decompress(tensors, scheme.upstream)["weight"]
    except Exception as error:  # upstream raises whatever its tensor code raises
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{where}: compressed-tensors cannot decompress it: {why}") from error
    return dense
