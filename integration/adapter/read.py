"""Read LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Source: ``peft/tuners/lora/config.py`` and ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
from int4_lora.integration.adapter.config import (
    check_plain_lora,
    is_targeted,
    rank_of,
    scaling_of,
)
from int4_lora.integration.adapter.files import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_folder,
    stored_tensors,
)
from int4_lora.integration.adapter.keys import KeyedTensor, SortedKeys, sort_keys
from int4_lora.integration.adapter.pairs import read_pair, where_of
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import inside

__all__ = ["read_adapter"]


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA adapter that PEFT saved.

    Args:
        path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter, with its tensors on the CPU in their stored dtype.

    Raises:
        FileNotFoundError: the folder, or a file that it must have, does not exist.
        TypeError: a tensor has the wrong dtype.
        ValueError: a file cannot be read, the adapter is not plain LoRA, or a rank contradicts the
            config; the message names file, module and rule.

    Example:
        >>> adapter = read_adapter("my-adapter")  # doctest: +SKIP
        >>> adapter.modules["model.layers.0.self_attn.q_proj"].scaling  # doctest: +SKIP
        2.0

    Source:
        ``LoraLayer.update_layer`` in ``peft/tuners/lora/layer.py``.
    """
    folder = adapter_folder(path)
    file = inside(folder, CONFIG_FILE)
    config = read_json_object(file)
    check_plain_lora(file, config)
    keys = sort_keys(stored_tensors(folder))
    _refuse_other_tensors(keys)
    modules = {name: _module(name, pair, config) for name, pair in keys.pairs.items()}
    if not modules:
        raise ValueError(f"{folder / TENSOR_FILE} holds no lora_A and lora_B")
    return Adapter(folder, config, modules)


def _refuse_other_tensors(keys: SortedKeys) -> None:
    """Refuse tensors that are not the pair of a linear layer."""
    embeddings = (tensor for pair in keys.embeddings.values() for tensor in pair.values())
    whole = (
        (tensor, "it is a whole weight (modules_to_save or save_embedding_layers)")
        for tensor in keys.whole.values()
    )
    for tensor, kind in (
        *((tensor, "it adapts an embedding") for tensor in embeddings),
        *((tensor, "it adapts single tokens") for tensor in keys.tokens.values()),
        *whole,
    ):
        raise ValueError(f"{tensor.where} is not lora_A or lora_B of a linear layer: {kind}")


def _module(name: str, pair: Mapping[str, KeyedTensor], config: Mapping[str, Any]) -> AdapterModule:
    """Read the pair of one linear layer, and check it against the config."""
    where = where_of(name, pair)
    a, b = read_pair(name, pair)
    if not is_targeted(config, name):
        raise ValueError(f"{where}: {CONFIG_FILE} does not target it, so PEFT would ignore it")
    rank = rank_of(config, name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: lora_A must be [{rank}, in_features] and lora_B [out_features, {rank}] "
            f"by the config's rank, got {list(a.shape)} and {list(b.shape)}"
        )
    return AdapterModule(a, b, scaling_of(config, name))
