"""Read LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Source: ``peft/tuners/lora/config.py`` and ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.config import (
    check_plain_lora,
    is_targeted,
    rank_of,
    scaling_of,
)
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import inside, read_tensor
from int4_lora.integration.checkpoint.safetensors_header import read_headers

__all__ = ["Adapter", "AdapterModule", "Replacement", "read_adapter"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
OTHER_KEYS = {
    "lora_magnitude_vector": "it belongs to DoRA",
    "lora_embedding_": "it adapts an embedding",
    "lora_": "it belongs to a variant of LoRA",
    ".base_layer.": "it is a weight of the base, saved along (save_embedding_layers)",
    ".weight": "it is a whole weight (modules_to_save or save_embedding_layers)",
}
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('adapter_model.bin', weights_only=True), "
    "'adapter_model.safetensors')\""
)

# PEFT writes the prefix but no adapter name; other tools omit the prefix or keep the name.
KEY = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """The low-rank pair of one linear layer.

    Args:
        a: ``[rank, in_features]``, float.
        b: ``[out_features, rank]``, of the same dtype.
        scaling: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``.
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Replacement:
    """Values that replace a tensor of the base, or some of its rows.

    Args:
        tensor: the values, of the base tensor's shape; ``[rows, ...]`` if only rows are replaced.
        rows: int64 ``[rows]``, the rows that are replaced; None if all are.
    """

    tensor: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of a model.

    Args:
        path: the adapter's folder.
        config: the content of ``adapter_config.json``.
        modules: the pair of each layer, by the layer's name in the base model.
        replacements: what replaces tensors of the base, by the tensor's full name there.
        notes: what was done to make the adapter fit, one sentence each.
    """

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, AdapterModule]
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with an adapter")
    file = inside(folder, CONFIG_FILE)
    config = read_json_object(file)
    check_plain_lora(file, config)
    pairs = _read_pairs(folder)
    modules = {}
    for name, pair in pairs.items():
        where = f"{folder / TENSOR_FILE}: {name}"
        if set(pair) != {"A", "B"}:
            missing = ({"A", "B"} - set(pair)).pop()
            raise ValueError(f"{where}: lora_{missing} is missing")
        if not is_targeted(config, name):
            raise ValueError(f"{where}: {CONFIG_FILE} does not target it, so PEFT would ignore it")
        modules[name] = _as_module(where, name, pair["A"], pair["B"], config)
    if not modules:
        raise ValueError(f"{folder / TENSOR_FILE} holds no lora_A and lora_B")
    return Adapter(folder, config, modules)


def _read_pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return lora_A and lora_B of each module."""
    if not (folder / TENSOR_FILE).is_file():
        if (folder / PICKLE_FILE).is_file():
            raise ValueError(
                f"{folder / PICKLE_FILE} is a pickle, which can run code and is not opened; "
                f"if you trust it, convert it there with: {CONVERT}"
            )
        raise FileNotFoundError(f"{folder / TENSOR_FILE} is not there")
    file = inside(folder, TENSOR_FILE)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, stored in read_headers(file).items():
        match = KEY.fullmatch(key)
        if match is None:
            kind = next((why for mark, why in OTHER_KEYS.items() if mark in key), "unknown")
            raise ValueError(f"{file}: {key} is not lora_A or lora_B of a linear layer: {kind}")
        pair = pairs.setdefault(match["module"], {})
        if match["matrix"] in pair:
            raise ValueError(f"{file}: {key} stands twice, with and without prefix or name")
        pair[match["matrix"]] = read_tensor(stored, key)
    return pairs


def _as_module(
    where: str, name: str, a: Tensor, b: Tensor, config: Mapping[str, Any]
) -> AdapterModule:
    rank = rank_of(config, name)
    if a.dtype not in FLOATS or b.dtype != a.dtype:
        dtypes = f"{a.dtype} and {b.dtype}".replace("torch.", "")
        raise TypeError(f"{where}: lora_A and lora_B must be float of one dtype, got {dtypes}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: lora_A must be [{rank}, in_features] and lora_B [out_features, {rank}] "
            f"by the config's rank, got {list(a.shape)} and {list(b.shape)}"
        )
    return AdapterModule(a, b, scaling_of(config, name))
