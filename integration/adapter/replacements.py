"""Read the tensors of an adapter that replace tensors of the base.

PEFT saves them for ``modules_to_save`` (modules that were trained as a whole),
``trainable_token_indices`` (rows of the embeddings) and ``save_embedding_layers`` (the embeddings
and the head as they were in the model, trained or not; ``base_layer`` stands in their key if they
have a pair too). When it loads an adapter, all of them take the place of the base's values.

Source: ``get_peft_model_state_dict`` and ``set_peft_model_state_dict`` in
``peft/utils/save_and_load.py``; ``ModulesToSaveWrapper`` and ``TrainableTokensWrapper`` in
``peft/utils/other.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import FLOATS, Replacement
from int4_lora.integration.adapter.embeddings import EMBEDDINGS
from int4_lora.integration.adapter.keys import KeyedTensor, SortedKeys
from int4_lora.integration.adapter.pairs import check_gathered

__all__ = ["read_replacements", "unsaved_notes"]

INDICES = "trainable_token_indices"
VOCABULARY = (*EMBEDDINGS, "lm_head", "embed_out")


def read_replacements(
    file: Path, config: Mapping[str, Any], keys: SortedKeys
) -> dict[str, Replacement]:
    """Read whole tensors and rows that replace those of the base.

    Args:
        file: adapter_config.json, for the messages.
        config: the content of adapter_config.json.
        keys: the adapter's tensors.

    Returns:
        The replacements, by the full name of the tensor in the base.

    Raises:
        TypeError: a tensor or an option has the wrong type.
        ValueError: a tensor is empty or not finite, two of them are for the same weight, PEFT would
            ignore one, the config's rows contradict it, or what the config names has no tensor; the
            message names file and tensor.
    """
    _check_saved(file, config, keys)
    adapted = {*keys.pairs, *keys.embeddings}
    replacements = {}
    for name, keyed in keys.whole.items():
        _check_one_meaning(config, name, keyed, adapted)
        trained = _is_module_to_save(config, name)
        replacements[name] = Replacement(_values(keyed), tied=not trained)
    for module, keyed in keys.tokens.items():
        name = f"{module}.weight"
        if module in adapted or name in replacements:
            raise ValueError(f"{keyed.where}: {module} has a pair or a whole weight too")
        values = _values(keyed)
        replacements[name] = Replacement(values, _rows(config, module, keyed, values))
    return replacements


def unsaved_notes(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return a note for each of ``modules_to_save`` of which the file holds no tensor.

    PEFT adds the heads of all classifiers there, of which a model has one.

    Args:
        config: the content of adapter_config.json.
        names: the full names of the whole tensors in the file.

    Example:
        >>> unsaved_notes({"modules_to_save": ["score", "lm_head"]}, ["score.weight"])
        ['modules_to_save names lm_head, and the file holds no tensor of it']
    """
    names = list(names)
    return [
        f"modules_to_save names {module}, and the file holds no tensor of it"
        for module in config.get("modules_to_save") or ()
        if not any(_is_module_to_save({"modules_to_save": [module]}, name) for name in names)
    ]


def _check_saved(file: Path, config: Mapping[str, Any], keys: SortedKeys) -> None:
    """Check that tensors are there for what the config says was trained as a whole, or by rows."""
    modules = config.get("modules_to_save")
    if modules and not any(_is_module_to_save(config, name) for name in keys.whole):
        raise ValueError(f"{file}: modules_to_save = {modules}, and no tensor of them was saved")
    indices = config.get(INDICES)
    if indices and not keys.tokens:
        raise ValueError(f"{file}: {INDICES} is set, and no rows were saved")
    if isinstance(indices, Mapping):
        saved = [rows for name, rows in indices.items() if _has_rows(name, keys)]
        lost = [name for name, rows in indices.items() if rows and rows not in saved]
        if lost:  # of two modules that are tied and have the same rows, PEFT saves one
            raise ValueError(f"{file}: {INDICES} names {lost[0]}, and no rows of it were saved")


def _has_rows(name: str, keys: SortedKeys) -> bool:
    return any(module.endswith(name) for module in keys.tokens)


def _check_one_meaning(
    config: Mapping[str, Any], name: str, keyed: KeyedTensor, adapted: set[str]
) -> None:
    """Refuse a whole tensor that PEFT would ignore, or whose module is also trained otherwise."""
    module = name.rpartition(".")[0]
    has_tokens = module.rpartition(".")[2] in VOCABULARY
    if not has_tokens and not _is_module_to_save(config, name):
        raise ValueError(
            f"{keyed.where} is a whole tensor of the model, and PEFT saves those of embeddings, of "
            "the head and of modules_to_save alone"
        )
    wrapped = ".base_layer." in keyed.key
    if wrapped and module not in adapted:
        raise ValueError(
            f"{keyed.where}: {module} has no lora_A and lora_B, so that PEFT would ignore the key"
        )
    if not wrapped and module in adapted:
        rule = (
            "PEFT trains one or the other"
            if _is_module_to_save(config, name)
            else ("PEFT would ignore the key without base_layer")
        )
        raise ValueError(f"{keyed.where}: {module} has lora_A and lora_B too: {rule}")


def _is_module_to_save(config: Mapping[str, Any], name: str) -> bool:
    """Return whether a module that holds the tensor is one of ``modules_to_save``."""
    modules = config.get("modules_to_save") or ()
    parts = name.split(".")[:-1]
    ancestors = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(one.endswith(module) for one in ancestors for module in modules)


def _values(keyed: KeyedTensor) -> Tensor:
    values = keyed.read()
    if values.dtype not in FLOATS:
        dtype = str(values.dtype).removeprefix("torch.")
        raise TypeError(f"{keyed.where} must be float to replace a weight, got {dtype}")
    check_gathered(keyed.where, values)
    if not values.isfinite().all():
        raise ValueError(f"{keyed.where} must be finite to replace a weight")
    return values


def _rows(config: Mapping[str, Any], module: str, keyed: KeyedTensor, values: Tensor) -> Tensor:
    """Return the indices of the rows that a trainable_tokens_delta replaces."""
    indices = config.get(INDICES)
    if isinstance(indices, Mapping):
        named = [rows for name, rows in indices.items() if module.endswith(name)]
        if len(named) != 1:
            raise ValueError(
                f"{keyed.where}: {INDICES} must name {module} once, and names {list(indices)}"
            )
        indices = named[0]
    ids = isinstance(indices, list) and all(type(row) is int and row >= 0 for row in indices)
    if not ids or not indices:
        raise TypeError(f"{keyed.where}: {INDICES} must be token ids, got {indices!r}")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{keyed.where}: {INDICES} must name each token once, got {indices}")
    if values.ndim != 2 or len(values) != len(indices):
        raise ValueError(
            f"{keyed.where} must be [{len(indices)}, ...] by {INDICES}, got {list(values.shape)}"
        )
    return torch.tensor(indices, dtype=torch.int64)
