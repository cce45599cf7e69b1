"""The INT4 model that a run trains on: its identity, its tokenizer, and what of it is trained.

Source: ``docs/lora-metadata.md``; ``AutoTokenizer`` of transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from int4_lora.integration.annotation.targets import lora_targets
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import bytes_of, read_tensor
from int4_lora.integration.huggingface.load import model_class

__all__ = [
    "base_digest",
    "default_dtype",
    "default_targets",
    "model_without_weights",
    "read_tokenizer",
    "size_of",
]

METADATA = "lora_metadata.json"
SAMPLE = 4096  # bytes
SUGGESTIONS = ("suggested_lora_targets", "lora_target_modules")


def base_digest(checkpoint: Checkpoint) -> str:
    """Return a digest that tells a model from others of its shapes, without reading every weight.

    It covers the name, dtype and shape of every tensor, all bytes of every scale and of every
    tensor up to ``2 * SAMPLE`` bytes, and the first and the last ``SAMPLE`` bytes of every other
    tensor. Models that differ only in the bytes between have the same digest. The samples are
    taken because GPTQ and rounding to nearest may choose the same scales and other codes, and
    because a dense layer may have been trained further. Scales are a thirtieth of an INT4
    checkpoint at group size 128.

    Args:
        checkpoint: the base model.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, stored in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, stored.dtype, list(stored.shape)]).encode())
        if name.endswith(".weight_scale") or stored.nbytes <= 2 * SAMPLE:
            parts = [(0, stored.nbytes)]
        else:
            parts = [(0, SAMPLE), (stored.nbytes - SAMPLE, stored.nbytes)]
        for start, stop in parts:
            digest.update(read_tensor(bytes_of(stored, start, stop), name).numpy().tobytes())
    return digest.hexdigest()


def model_without_weights(checkpoint: Checkpoint) -> nn.Module:
    """Return the model that transformers would load, all of its tensors on the meta device.

    Args:
        checkpoint: the base model.
    """
    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    kind = model_class(config)
    with torch.device("meta"):
        model: nn.Module = getattr(kind, "from_config", kind)(config)
    return model


def default_targets(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the modules that a checkpoint suggests to train.

    They are ``suggested_lora_targets`` or ``lora_target_modules`` of ``lora_metadata.json`` or
    ``config.json``, in this order; of a checkpoint without them, what ``int4-lora annotate`` would
    write there.

    Args:
        checkpoint: the base model.

    Raises:
        ValueError: nothing of the model is INT4.
    """
    file = checkpoint.path / METADATA
    metadata = read_json_object(file) if file.is_file() else {}
    for source in (metadata, checkpoint.config):
        for key in SUGGESTIONS:
            names = source.get(key)
            if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
                return tuple(names)
    targets = lora_targets(checkpoint)
    if not targets.modules:
        raise ValueError(f"{checkpoint.path}: no INT4 module can take an adapter")
    return targets.suggested or targets.modules


def default_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype to train in: the model's, and bfloat16 where that is float16.

    Gradients in float16 need their loss scaled, which is left to the user.

    Args:
        checkpoint: the base model.
    """
    config = checkpoint.config
    parts: list[Mapping[str, Any]] = [config, config.get("text_config") or {}]
    stored = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    return "float32" if "float32" in stored else "bfloat16"


def size_of(checkpoint: Checkpoint, name: str) -> int | None:
    """Return a positive whole number of config.json or of its ``text_config``; None if it has none.

    Args:
        checkpoint: the base model.
        name: the key, such as ``max_position_embeddings``.
    """
    text = checkpoint.config.get("text_config") or {}
    value = text.get(name, checkpoint.config.get(name))
    return value if type(value) is int and value > 0 else None


def read_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model.

    Args:
        folder: the model's folder.

    Raises:
        ValueError: the folder has no tokenizer, or transformers cannot load it.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises any of six for a folder without
        detail = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder}: transformers loads no tokenizer from it: {detail}") from error
