"""AWQ's and GPTQ's ``quantization_config`` in the terms of compressed-tensors.

vLLM asks the configuration which layers are quantised before it sees a tensor. What cannot be told
from the configuration is refused; ``int4-lora convert`` reads the tensors as well.

Source: ``integration/checkpoint/other_schemes.py`` for the fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from int4_lora.integration.checkpoint.model_files import read_model_files
from int4_lora.integration.checkpoint.open import FLOATS
from int4_lora.integration.checkpoint.other_schemes import OTHER_SCHEMES
from int4_lora.integration.checkpoint.scheme import PACKED_FORMAT, Scheme

__all__ = ["CONVERT", "dense_modules", "in_terms_of_compressed_tensors", "read_source"]

CONVERT = "int4-lora convert writes a compressed-tensors checkpoint with the same weights"
PER_MODULE = {  # fields of GPTQ that describe single modules, and what they may be
    "dynamic": (None, {}),
    "lm_head": (None, False),
    "modules_in_block_to_quantize": (None, []),
}


def read_source(config: Mapping[str, Any]) -> Scheme | None:
    """Return how an AWQ or GPTQ checkpoint stores its weights; None for compressed-tensors.

    Args:
        config: the ``quantization_config``.

    Raises:
        ValueError: a field has a value that is not taken; the message names the field.
    """
    method = str(config.get("quant_method", "")).lower()
    if method not in OTHER_SCHEMES:
        return None
    for field, plain in PER_MODULE.items():
        if config.get(field) not in plain:
            raise ValueError(
                f"int4_lora: {field} of a {method} checkpoint describes single modules, and vLLM's "
                f"layers are made before their tensors are seen: {CONVERT}"
            )
    module = "a linear layer"
    return OTHER_SCHEMES[method](Path("config.json"), config, [module])[module]


def in_terms_of_compressed_tensors(config: Mapping[str, Any], source: Scheme) -> dict[str, Any]:
    """Return the ``quantization_config`` of compressed-tensors for the same weights.

    Args:
        config: the ``quantization_config`` of AWQ or GPTQ.
        source: returned by ``read_source``.
    """
    skipped = config.get("modules_to_not_convert") or []
    weights = {
        "num_bits": source.bits,
        "type": "int",
        "symmetric": source.symmetric,
        "strategy": source.strategy,
        "group_size": source.group_size,
        "actorder": source.actorder,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *(f"re:.*{re.escape(part)}.*" for part in skipped)],
    }


def dense_modules(folder: Path) -> list[str]:
    """Return the modules of a folder's model whose weight is a float matrix.

    Args:
        folder: the checkpoint's folder.
    """
    tensors = read_model_files(folder).tensors
    return [
        name.removesuffix(".weight")
        for name, stored in tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2 and stored.dtype in FLOATS
    ]
