"""Read LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Source: ``peft/tuners/lora/config.py`` and ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
from int4_lora.integration.adapter.config import (
    check_plain_lora,
    order_notes,
    rank_of,
    scaling_of,
)
from int4_lora.integration.adapter.embeddings import embedding_module, is_copy_for_tied_head
from int4_lora.integration.adapter.experts import parameter_modules, parameter_owners
from int4_lora.integration.adapter.files import CONFIG_FILE, adapter_folder, stored_tensors
from int4_lora.integration.adapter.int4_form import form_and_plain_config
from int4_lora.integration.adapter.keys import KeyedTensor, SortedKeys, sort_keys
from int4_lora.integration.adapter.pairs import read_pair, where_of
from int4_lora.integration.adapter.remarks import remarks
from int4_lora.integration.adapter.replacements import read_replacements, unsaved_notes
from int4_lora.integration.adapter.targeting import check_targeted
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import inside

__all__ = ["read_adapter"]


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA adapter that PEFT saved, or an adapter in INT4 of ``write_adapter``.

    The pairs of an adapter in INT4 are returned dequantised, in the dtype of their scales; its
    ``config`` is that of the adapter in floats, and a note says how it is stored.

    Args:
        path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or with
            the latter's shards.

    Returns:
        The adapter, with its tensors on the CPU in their stored dtype; where the dtypes of a pair
        differ, in the smallest dtype that represents both exactly.

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
    form, config = form_and_plain_config(file, read_json_object(file))
    check_plain_lora(file, config)
    keys = sort_keys(stored_tensors(folder), form)
    replacements = read_replacements(file, config, keys)
    modules, notes = _modules(file, config, keys)
    if not modules and not replacements:
        raise ValueError(f"{folder} holds no lora_A and lora_B")
    unsaved = unsaved_notes(config, replacements)
    stored = () if form is None else (f"stored in {form.describe()}, read dequantised",)
    said = (*stored, *keys.notes, *notes, *unsaved, *remarks(config, modules))
    return Adapter(folder, config, modules, replacements, said)


def _modules(
    file: Path, config: Mapping[str, Any], keys: SortedKeys
) -> tuple[dict[str, AdapterModule], list[str]]:
    """Read the pairs of linear layers, of parameters and of embeddings."""
    embeddings = {
        name: embedding_module(config, name, pair) for name, pair in keys.embeddings.items()
    }
    owners = parameter_owners(config, keys.pairs)
    of_parameters = {name for names in owners.values() for name in names}
    linear = {
        name: tuple({name, keys.wrapped.get(name, name)})
        for name, pair in keys.pairs.items()
        if name not in of_parameters and not is_copy_for_tied_head(config, name, pair, embeddings)
    }
    notes = [*check_targeted(file, config, list(linear.values())), *order_notes(config, linear)]
    modules = {name: _module(name, keys.pairs[name], config, linear[name]) for name in linear}
    for owner, names in owners.items():
        modules |= parameter_modules(config, owner, [keys.pairs[name] for name in names])
    return modules | embeddings, notes


def _module(
    name: str, pair: Mapping[str, KeyedTensor], config: Mapping[str, Any], names: tuple[str, ...]
) -> AdapterModule:
    """Read the pair of one linear layer, and check it against the config."""
    where = where_of(name, pair)
    a, b = read_pair(name, pair)
    rank, scaling = _settings(where, config, names, a.shape[0])
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: lora_A must be [{rank}, in_features] and lora_B [out_features, {rank}] "
            f"by the config's rank, got {list(a.shape)} and {list(b.shape)}"
        )
    return AdapterModule(a, b, scaling)


def _settings(
    where: str, config: Mapping[str, Any], names: Sequence[str], rows: int
) -> tuple[int, float]:
    """Return rank and scaling; of several names of a layer, those whose rank is stored count."""
    settings = {(rank_of(config, name), scaling_of(config, name)): name for name in names}
    fitting = {setting for setting in settings if setting[0] == rows} or set(settings)
    if len(fitting) > 1:
        rules = ", or ".join(
            f"{rank} and {scaling} for {name}" for (rank, scaling), name in settings.items()
        )
        raise ValueError(f"{where}: rank and scaling by the config are {rules}")
    return fitting.pop()
