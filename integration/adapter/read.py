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
from int4_lora.integration.adapter.embeddings import embedding_module, is_copy_for_tied_head
from int4_lora.integration.adapter.experts import parameter_modules, parameter_owners
from int4_lora.integration.adapter.files import (
    CONFIG_FILE,
    TENSOR_FILE,
    adapter_folder,
    stored_tensors,
)
from int4_lora.integration.adapter.keys import KeyedTensor, SortedKeys, sort_keys
from int4_lora.integration.adapter.pairs import read_pair, where_of
from int4_lora.integration.adapter.replacements import read_replacements
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
    modules = _modules(config, keys)
    replacements = read_replacements(file, config, keys)
    if not modules and not replacements:
        raise ValueError(f"{folder / TENSOR_FILE} holds no lora_A and lora_B")
    return Adapter(folder, config, modules, replacements)


def _modules(config: Mapping[str, Any], keys: SortedKeys) -> dict[str, AdapterModule]:
    """Read the pairs of linear layers, of parameters and of embeddings."""
    embeddings = {
        name: embedding_module(config, name, pair) for name, pair in keys.embeddings.items()
    }
    owners = parameter_owners(config, keys.pairs)
    of_parameters = {name for names in owners.values() for name in names}
    modules = {}
    for name, pair in keys.pairs.items():
        if name in of_parameters or is_copy_for_tied_head(config, name, pair, embeddings):
            continue
        modules[name] = _module(name, pair, config)
    for owner, names in owners.items():
        modules |= parameter_modules(config, owner, [keys.pairs[name] for name in names])
    return modules | embeddings


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
