"""Make ``lora_metadata.json``: the modules that adapters can target, and each weight's packing.

Source: ``docs/lora-metadata.md``; its schema is ``lora_metadata.schema.json`` beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from int4_lora.integration.annotation.targets import LoRATargets
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES

__all__ = ["KEYS", "metadata_of", "metadata_text"]

VERSION = 1
SCHEMA = f"urn:int4-lora:lora-metadata:{VERSION}"
KEYS = (
    "$schema",
    "version",
    "lora_compatible",
    "incompatible_because",
    "lora_target_modules",
    "suggested_lora_targets",
    "modules",
)
PARTS = {
    "packed": "weight_packed",
    "scale": "weight_scale",
    "zero_point": "weight_zero_point",
    "g_idx": "weight_g_idx",
}
UNPACKED = ("tensor", "block")  # strategies with int8 zero-points, one for each scale


def metadata_of(checkpoint: Checkpoint, targets: LoRATargets) -> dict[str, Any]:
    """Return the content of ``lora_metadata.json``.

    Only headers and ``weight_shape`` are read, except that modules with ``weight_g_idx`` or int8
    zero-points are read completely to check their values.

    Args:
        checkpoint: an open checkpoint.
        targets: the modules that adapters can target.

    Returns:
        The content, as JSON types; ``modules`` holds the pack-quantized modules of 4 or 8 bits.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other or the config; the message names file, module and
            rule.
    """
    packed = [name for name in checkpoint.modules() if checkpoint.is_pack_quantized(name)]
    values = (
        SCHEMA,
        VERSION,
        targets.compatible,
        list(targets.incompatible_because),
        list(targets.modules),
        list(targets.suggested),
        {name: _module(checkpoint, name) for name in packed},
    )
    return dict(zip(KEYS, values, strict=True))


def metadata_text(metadata: Mapping[str, Any]) -> str:
    """Return the text of ``lora_metadata.json``, one line per module.

    Args:
        metadata: the content that ``metadata_of`` returned.
    """
    head = json.dumps({key: metadata[key] for key in KEYS[:-1]}, indent=2).removesuffix("\n}")
    modules = metadata[KEYS[-1]].items()
    lines = [f"    {json.dumps(name)}: {json.dumps(module)}" for name, module in modules]
    return f'{head},\n  "{KEYS[-1]}": {{\n' + ",\n".join(lines) + "\n  }\n}\n"


def _module(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Describe one module, after checking that its tensors and the config agree."""
    scheme = checkpoint.schemes[name]
    shape = checkpoint.shape_of(name)
    g_idx = _check(checkpoint, name)
    parts = [
        part
        for part, end in PARTS.items()
        if f"{name}.{end}" in checkpoint.tensors and (part != "g_idx" or g_idx)
    ]
    packed_zero_points = not scheme.symmetric and scheme.strategy not in UNPACKED
    return {
        "shape": list(shape),
        "dtype": _dtype(checkpoint, f"{name}.weight_scale"),
        "bits": scheme.bits,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "scale_covers": _scale_covers(scheme.strategy, scheme.group_size, shape),
        "symmetric": scheme.symmetric,
        "g_idx": g_idx,
        "packing": {
            "codes_per_word": 32 // scheme.bits,
            "first_code": "lowest_bits",
            "offset": 2 ** (scheme.bits - 1),
            "dim": 1,
            "zero_point_dim": 0 if packed_zero_points else None,
        },
        "tensors": {part: _tensor(checkpoint, f"{name}.{PARTS[part]}") for part in parts},
    }


def _check(checkpoint: Checkpoint, name: str) -> bool:
    """Check a module; return whether ``weight_g_idx`` assigns columns to groups."""
    scheme = checkpoint.schemes[name]
    unpacked = not scheme.symmetric and scheme.strategy in UNPACKED
    if unpacked or f"{name}.weight_g_idx" in checkpoint.tensors:
        checkpoint.packed_weight(name)
        return not checkpoint.column_order(name)
    checkpoint.check(name)
    return False


def _scale_covers(
    strategy: str, size: int | tuple[int, int] | None, shape: tuple[int, int]
) -> list[int]:
    """Return the number of rows and of columns that share a scale."""
    if isinstance(size, tuple):
        return list(size)
    rows = shape[0] if strategy == "tensor" else 1
    return [rows, shape[1] if size is None else size]


def _tensor(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    stored = checkpoint.tensors[name]
    return {
        "name": name,
        "file": stored.file.name,
        "dtype": _dtype(checkpoint, name),
        "shape": list(stored.shape),
    }


def _dtype(checkpoint: Checkpoint, name: str) -> str:
    """Return torch's name of a tensor's dtype."""
    return str(DTYPES[checkpoint.tensors[name].dtype]).removeprefix("torch.")
