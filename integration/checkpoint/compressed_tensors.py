"""Decompress modules with compressed-tensors, to compare our result with its result.

Source: ``compressed_tensors/compressors/pack_quantized/base.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.layouts import (
    AWQ,
    FLOAT4,
    INT_QUANTIZED,
    LAYOUTS,
    PACK_QUANTIZED,
)
from int4_lora.integration.checkpoint.open import PARTS, Checkpoint
from int4_lora.integration.checkpoint.scheme import PACKED_FORMAT, Scheme
from int4_lora.reference import PackedWeight

__all__ = [
    "decompress",
    "decompress_module",
    "decompress_tensors",
    "module_tensors",
    "stored_tensors",
    "tensors_of",
    "upstream_scheme",
    "upstream_version",
]


def decompress(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the dense weight of one module as compressed-tensors computes it.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a quantised module.

    Returns:
        ``[out_features, in_features]`` in the scale's dtype.

    Raises:
        ImportError: compressed-tensors is not installed.
        KeyError: the module is not quantised.
        ValueError: a file cannot be read.
        Exception: any exception that compressed-tensors raises.
    """
    scheme = checkpoint.schemes[name]
    return decompress_tensors(
        stored_tensors(checkpoint, name), upstream_scheme(scheme), scheme.format
    )


def stored_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Return the tensors of one module, by the last part of their names in compressed-tensors.

    ``weight_shape`` is int64, in whichever dtype it is stored, or if it is not stored at all.
    AWQ's tensors with zero-points are converted by compressed-tensors, if it can; others, and
    GPTQ's, which it does not read, are those of the packed weight.
    """
    if checkpoint.layout(name) is INT_QUANTIZED:
        return {
            full.rpartition(".")[2]: checkpoint.tensor(full) for full in checkpoint.stored(name)
        }
    if checkpoint.layout(name) is not PACK_QUANTIZED:
        return _converted(checkpoint, name)
    stored = {
        part: checkpoint.tensor(f"{name}.{part}")
        for part in PARTS
        if part != "weight_shape" and f"{name}.{part}" in checkpoint.tensors
    }
    return {**stored, "weight_shape": torch.tensor(checkpoint.shape_of(name))}


def _converted(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Return the tensors that compressed-tensors would store for a module of GPTQ or AWQ."""
    try:
        converter = import_upstream("entrypoints.convert.converters").AutoAWQConverter
    except (AttributeError, ImportError):  # before 0.16
        converter = None
    scheme = checkpoint.schemes[name]
    if converter is None or scheme.format != AWQ or scheme.symmetric:
        return tensors_of(checkpoint.packed_weight(name))
    whole = {
        f"m.{full.rpartition('.')[2]}": checkpoint.tensor(full) for full in checkpoint.stored(name)
    }
    return {full.removeprefix("m."): tensor for full, tensor in converter().process(whole).items()}


def tensors_of(weight: PackedWeight) -> dict[str, Tensor]:
    """Return a packed weight's tensors by their names in compressed-tensors."""
    tensors = {
        "weight_packed": weight.packed,
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.shape),
        "weight_zero_point": weight.zero_point,
        "weight_g_idx": weight.g_idx,
    }
    return {part: tensor for part, tensor in tensors.items() if tensor is not None}


def decompress_tensors(
    tensors: Mapping[str, Tensor], scheme: Any, form: str = PACKED_FORMAT
) -> Tensor:
    """Decompress one module's tensors with compressed-tensors.

    Args:
        tensors: returned by ``stored_tensors``.
        scheme: upstream's ``QuantizationScheme``.
        form: the format of the module.
    """
    if form in FLOAT4 or LAYOUTS.get(form) is INT_QUANTIZED:
        base = import_upstream("compressors").BaseCompressor
        compressor = base.get_value_from_registry(form)
    else:
        base = import_upstream("compressors.pack_quantized.base")
        compressor = base.PackedQuantizationCompressor
    dense: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return dense


def upstream_scheme(scheme: Scheme) -> Any:
    """Convert a scheme to compressed-tensors' ``QuantizationScheme``.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: compressed-tensors rejects the scheme.
    """
    upstream = import_upstream("quantization")
    blocks = list(scheme.group_size) if isinstance(scheme.group_size, tuple) else None
    weights = upstream.QuantizationArgs(
        num_bits=scheme.bits,
        type=scheme.kind,
        symmetric=scheme.symmetric,
        strategy=scheme.strategy,
        group_size=None if blocks else scheme.group_size,
        block_structure=blocks,
        dynamic=scheme.strategy == "token",
    )
    return upstream.QuantizationScheme(targets=[], weights=weights)


def import_upstream(module: str) -> Any:
    """Import a module of compressed-tensors.

    Raises:
        ImportError: compressed-tensors is not installed; the message names the extra to install.
    """
    try:
        return importlib.import_module(f"compressed_tensors.{module}")
    except ModuleNotFoundError as error:
        name = (error.name or "").replace("_", "-")
        raise ImportError(f"{name} is missing: pip install 'int4-lora[checkpoints]'") from error


def upstream_version() -> str:
    """Return the version of the installed compressed-tensors, after importing it.

    Raises:
        ImportError: compressed-tensors cannot be imported.
    """
    import_upstream("quantization")
    return version("compressed-tensors")


def module_tensors(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the last parts of the names of the tensors that hold a module's weight, any format."""
    return [part for part in checkpoint.parts[name] if part.startswith("weight")]


def decompress_module(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the dense weight of a module of any format, as compressed-tensors computes it.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a quantised module.

    Raises:
        ValueError: the installed compressed-tensors cannot decompress the module; the message names
            the module.
    """
    scheme = checkpoint.schemes[name]
    where = f"{checkpoint.path}: {name}"
    tensors = {
        part: checkpoint.tensor(f"{name}.{part}") for part in module_tensors(checkpoint, name)
    }
    try:
        base = import_upstream("compressors").BaseCompressor
        compressor = base.get_value_from_registry(scheme.format)
        dense: Tensor = compressor.decompress(tensors, upstream_scheme(scheme))["weight"]
    except Exception as error:  # its tensor code can raise any exception
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{where}: compressed-tensors cannot decompress it: {why}") from error
    return dense
