"""Check PEFT's adapter_config.json, and read each layer's rank and scaling from it.

Source: ``peft/tuners/lora/config.py``, and ``get_pattern_key`` in ``peft/utils/other.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from int4_lora.integration.adapter.peft_table import check_initialisation, check_options
from int4_lora.integration.adapter.targeting import NEWEST, SAVED

__all__ = ["check_plain_lora", "order_notes", "rank_of", "scaling_of"]

ENDING = r"(.*\.)?({})$"  # PEFT inserts each key of rank_pattern and alpha_pattern at {}
MLX = (
    "lora_parameters is an option of mlx-lm, whose adapters are not read; write the adapter in "
    "PEFT's format with int4_lora.integration's write_adapter(FOLDER, {module: "
    "AdapterModule(lora_a.T, lora_b.T, scale) for each module of adapters.safetensors})"
)


def check_plain_lora(file: Path, config: Mapping[str, Any]) -> None:
    """Check that a config describes plain LoRA, with valid options.

    Args:
        file: adapter_config.json, for the messages.
        config: the content of adapter_config.json.

    Raises:
        ValueError: the config is of another method, or an option has the wrong type or value; the
            message names the option.
    """
    if config.get("peft_type") != "LORA":
        if "lora_parameters" in config and config.get("fine_tune_type", "lora") == "lora":
            raise ValueError(f"{file}: {MLX}")
        raise ValueError(f"{file}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    check_options(file, config)
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias must be 'none', got {config['bias']!r}")
    for option in ("use_rslora", "inference_mode"):
        if type(config.get(option, False)) is not bool:
            raise ValueError(f"{file}: {option} must be true or false, got {config[option]!r}")
    check_initialisation(file, config)
    _check_numbers(file, config, "r", "rank_pattern", _is_rank, "a positive whole number")
    _check_numbers(file, config, "lora_alpha", "alpha_pattern", _is_finite, "a finite number")
    _check_targets(file, config)


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Return the rank of the layer ``name``: that of the first pattern that matches, or ``r``.

    Args:
        config: the content of adapter_config.json, checked by ``check_plain_lora``.
        name: the layer's name in PEFT.

    Example:
        >>> rank_of({"r": 8, "rank_pattern": {"up_proj": 4}}, "model.layers.0.mlp.up_proj")
        4
    """
    return int(_by_pattern(config.get("rank_pattern"), name, config["r"]))


def scaling_of(config: Mapping[str, Any], name: str) -> float:
    """Return the scaling of the layer ``name``: alpha / rank, or alpha / sqrt(rank) with rslora.

    Args:
        config: the content of adapter_config.json, checked by ``check_plain_lora``.
        name: the layer's name in PEFT.

    Example:
        >>> scaling_of({"r": 12, "lora_alpha": 8}, "model.layers.0.mlp.up_proj")
        0.6666666666666666
    """
    alpha, rank = (
        _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]),
        rank_of(config, name),
    )
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def order_notes(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return a note if the order of ``alpha_pattern`` matters, for PEFT sorts it when it saves.

    The first pattern that matches a layer counts. After sorting, another may be the first than in
    training; PEFT's own loading then takes another alpha, too.

    Args:
        config: the content of adapter_config.json.
        names: the layers' names.

    Example:
        >>> config = {"alpha_pattern": {"layers.0.q_proj": 7, "q_proj": 5}}
        >>> order_notes(config, ["layers.0.q_proj"])[0][:64]
        "alpha_pattern: 'layers.0.q_proj' and 'q_proj' match layers.0.q_p"
    """
    patterns = config.get("alpha_pattern") or {}
    if list(config) != sorted(config) or list(patterns) != sorted(patterns):
        return []  # PEFT, which sorts all of a config, did not write this one
    for name in names:
        matching = [key for key in patterns if re.match(ENDING.format(key), name)]
        if len({patterns[key] for key in matching}) > 1:
            listed = " and ".join(map(repr, matching))
            return [
                f"alpha_pattern: {listed} match {name}; the first counts, as when PEFT loads the "
                "adapter, but PEFT sorts patterns when it saves them, so that in training another "
                "may have been the first"
            ]
    return []


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(ENDING.format(pattern), name):
            return value
    return default


def _check_numbers(
    file: Path,
    config: Mapping[str, Any],
    option: str,
    patterns: str,
    is_valid: Callable[[object], bool],
    rule: str,
) -> None:
    """Check a number, and the values that replace it for the layers that match a pattern."""
    if not is_valid(config.get(option)):
        raise ValueError(f"{file}: {option} must be {rule}, got {config.get(option)!r}")
    by_pattern = config.get(patterns) or {}
    if not isinstance(by_pattern, dict):
        raise ValueError(f"{file}: {patterns} must be an object, got {by_pattern!r}")
    for pattern, value in by_pattern.items():
        where = f"{file}: {patterns}[{pattern!r}]"
        _check_pattern(where, pattern, ENDING.format(pattern))
        if not is_valid(value):
            raise ValueError(f"{where} must be {rule}, got {value!r}")


def _check_targets(file: Path, config: Mapping[str, Any]) -> None:
    """Check the options that choose layers: types, and regular expressions."""
    for option in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(option)
        if value is not None and not isinstance(value, str) and not _is_list_of(value, str):
            raise ValueError(f"{file}: {option} must be a string or strings, got {value!r}")
        if isinstance(value, str) and option != "layers_pattern":
            _check_pattern(f"{file}: {option}", value, value)
    patterns = config.get("layers_pattern") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        used = NEWEST.pattern.format(pattern)
        _check_pattern(f"{file}: layers_pattern", pattern, used)
    for option in ("target_parameters", "modules_to_save"):
        value = config.get(option)
        if value is not None and not _is_list_of(value, str):
            raise ValueError(f"{file}: {option} must be strings, got {value!r}")
    for saved in config.get("modules_to_save") or ():
        _check_pattern(f"{file}: modules_to_save", saved, SAVED.format(saved))
    layers = config.get("layers_to_transform")
    if layers is not None and type(layers) is not int and not _is_list_of(layers, int):
        raise ValueError(f"{file}: layers_to_transform must be an int or ints, got {layers!r}")


def _check_pattern(where: str, pattern: str, used: str) -> None:
    """Check ``used``, the regular expression that PEFT makes from ``pattern``."""
    try:
        re.compile(used)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: object) -> bool:
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and math.isfinite(value)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
