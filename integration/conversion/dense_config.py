"""A dense model's config.json, from that of a quantised one.

Source: ``PretrainedConfig`` of transformers, whose ``torch_dtype`` became ``dtype``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from int4_lora.integration.checkpoint.scheme import CONFIG_KEYS

__all__ = ["dense_config"]

DTYPE_KEYS = ("dtype", "torch_dtype")
ABOUT_INT4 = ("lora_compatible", "lora_target_modules", "suggested_lora_targets")


def dense_config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return a config without what speaks of quantisation.

    Args:
        config: of the quantised model.
        dtype: of the dense model, or None to leave what the config says.

    Example:
        >>> dense_config({"dtype": "float16", "quantization_config": {}}, torch.bfloat16)
        {'dtype': 'bfloat16'}
    """
    found = copy.deepcopy(dict(config))
    parts = [found, *(part for part in found.values() if isinstance(part, dict))]  # text, vision
    for part in parts:
        for key in (*CONFIG_KEYS, *ABOUT_INT4):
            part.pop(key, None)
        for key in DTYPE_KEYS:
            if key in part and dtype is not None:
                part[key] = str(dtype).removeprefix("torch.")
    if dtype is not None and not any(key in found for key in DTYPE_KEYS):
        found["torch_dtype"] = str(dtype).removeprefix("torch.")
    return found
