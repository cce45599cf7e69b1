"""LoRA adapters in PEFT's folder format: adapter_config.json and adapter_model.safetensors.

Source: ``peft/tuners/lora/config.py`` and ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from int4_lora.integration.checkpoint import Checkpoint
from int4_lora.integration.json_files import read_json_object
from int4_lora.reference import LoRAStack

__all__ = ["Adapter", "AdapterModule", "check_fits", "read_adapter", "stack_adapters"]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")

# What changes the formula: y = W x + scaling * B A x is not what such an adapter means.
REFUSED_WHEN_SET = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


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
class Adapter:
    """One adapter of a whole model.

    Args:
        path: its folder.
        config: the whole ``adapter_config.json``.
        modules: what it adds to each layer, by the layer's name in the base model.
    """

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, AdapterModule]


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read a LoRA adapter that PEFT saved.

    Args:
        path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The adapter, its tensors on the CPU in the dtype they are stored in.

    Raises:
        FileNotFoundError: the folder, or a file it must have, is not there.
        TypeError: a tensor of the wrong dtype.
        ValueError: a file that cannot be read, an adapter that is not plain LoRA, or a rank that
            contradicts the config; the message names file, module and rule.

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
    config = read_json_object(folder / CONFIG_FILE)
    _check_plain_lora(folder / CONFIG_FILE, config)
    pairs = _read_pairs(folder / TENSOR_FILE)
    modules = {}
    for name, pair in pairs.items():
        where = f"{folder / TENSOR_FILE}: {name}"
        if set(pair) != {"A", "B"}:
            missing = ({"A", "B"} - set(pair)).pop()
            raise ValueError(f"{where}: lora_{missing} is missing")
        modules[name] = _as_module(where, name, pair["A"], pair["B"], config)
    if not modules:
        raise ValueError(f"{folder / TENSOR_FILE} holds no lora_A and lora_B")
    return Adapter(folder, config, modules)


def stack_adapters(
    adapters: Sequence[Adapter], name: str, in_features: int, out_features: int
) -> LoRAStack | None:
    """Stack what several adapters add to one layer; ids are positions in ``adapters``.

    An adapter that leaves the layer alone adds zero. Adapters of different dtypes are widened to
    the smallest dtype that holds all of them exactly.

    Args:
        adapters: the adapters.
        name: the layer's name in the base model.
        in_features: columns of the layer's weight.
        out_features: rows of the layer's weight.

    Returns:
        The stack, or None where no adapter targets the layer.

    Raises:
        ValueError: an adapter whose shapes do not fit the layer; the message names both.
    """
    present = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
    if not present:
        return None
    dtype = present[0].a.dtype
    for module in present:
        dtype = torch.promote_types(dtype, module.a.dtype)
    none = AdapterModule(
        torch.zeros(1, in_features, dtype=dtype), torch.zeros(out_features, 1, dtype=dtype), 0.0
    )
    stacked = []
    for adapter in adapters:
        module = adapter.modules.get(name, none)
        found = (module.b.shape[0], module.a.shape[1])
        if found != (out_features, in_features):
            raise ValueError(
                f"{adapter.path}: {name}: the adapter is for a weight of {list(found)}, "
                f"the base has [{out_features}, {in_features}]"
            )
        stacked.append((module.a.to(dtype), module.b.to(dtype), module.scaling))
    return LoRAStack.stack(stacked)


def check_fits(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Check that every layer an adapter targets is a quantised module of its shapes.

    Args:
        adapter: an adapter.
        checkpoint: the base it is to be used with.

    Raises:
        ValueError: a layer the base does not have quantised, or of other shapes.
    """
    quantised = set(checkpoint.modules())
    for name in adapter.modules:
        if name not in quantised:
            raise ValueError(f"{adapter.path}: {name} is no quantised module of {checkpoint.path}")
        rows, columns = checkpoint.tensor(f"{name}.weight_shape").tolist()
        stack_adapters([adapter], name, columns, rows)


def _check_plain_lora(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for option in REFUSED_WHEN_SET:
        if config.get(option):
            raise ValueError(f"{file}: {option} = {config[option]!r} is not plain LoRA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias must be 'none', got {config['bias']!r}")
    for option, patterns, right in (
        ("r", "rank_pattern", _is_rank),
        ("lora_alpha", "alpha_pattern", _is_finite),
    ):
        by_pattern = config.get(patterns) or {}
        if not isinstance(by_pattern, dict):
            raise ValueError(f"{file}: {patterns} must be an object, got {by_pattern!r}")
        for pattern, value in {None: config.get(option), **by_pattern}.items():
            name = option if pattern is None else f"{patterns}[{pattern!r}]"
            if not right(value):
                rule = "a positive whole number" if right is _is_rank else "a finite number"
                raise ValueError(f"{file}: {name} must be {rule}, got {value!r}")
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{file}: {name}: {error}") from error


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast("float", value))


def _read_pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    """Return lora_A and lora_B of each module."""
    if not file.is_file():
        pickled = file.with_suffix(".bin").is_file()
        hint = " (adapter_model.bin is a pickle, which is not opened)" if pickled else ""
        raise FileNotFoundError(f"{file} is not there{hint}")
    pairs: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open is no mapping)
                match = KEY.fullmatch(key)
                if match is None:
                    raise ValueError(f"{file}: {key} is not lora_A or lora_B of a linear layer")
                pairs.setdefault(match["module"], {})[match["matrix"]] = opened.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
    return pairs


def _as_module(
    where: str, name: str, a: Tensor, b: Tensor, config: Mapping[str, Any]
) -> AdapterModule:
    rank = _by_pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    if not all(tensor.is_floating_point() for tensor in (a, b)):
        raise TypeError(f"{where}: lora_A and lora_B must be float, got {a.dtype} and {b.dtype}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: lora_A must be [{rank}, in_features] and lora_B [out_features, {rank}] "
            f"by the config's rank, got {list(a.shape)} and {list(b.shape)}"
        )
    return AdapterModule(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
