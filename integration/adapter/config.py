"""Read PEFT's adapter_config.json: which layers an adapter targets, with which rank and scaling.

Source: ``peft/tuners/lora/config.py``, ``check_target_module_exists`` in
``peft/tuners/tuners_utils.py`` and ``get_pattern_key`` in ``peft/utils/other.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["check_plain_lora", "is_targeted", "rank_of", "scaling_of"]

ALL_LINEAR = "all-linear"
LAYER = r".*\.{}\.(\d+)\."  # PEFT inserts layers_pattern at {}
ENDING = r"(.*\.)?({})$"  # PEFT inserts each key of rank_pattern and alpha_pattern at {}

# With any of these options, the layer is not y = W x + scaling * B A x.
REFUSED_WHEN_SET = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")


def check_plain_lora(file: Path, config: Mapping[str, Any]) -> None:
    """Check that a config describes plain LoRA on linear layers, with valid options.

    Args:
        file: adapter_config.json, for the messages.
        config: the content of adapter_config.json.

    Raises:
        ValueError: the config is of another method, or an option has the wrong type or value; the
            message names the option.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type must be 'LORA', got {config.get('peft_type')!r}")
    for option in REFUSED_WHEN_SET:
        if config.get(option):
            raise ValueError(f"{file}: {option} = {config[option]!r} is not plain LoRA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{file}: bias must be 'none', got {config['bias']!r}")
    for option in ("use_rslora", "inference_mode"):
        if type(config.get(option, False)) is not bool:
            raise ValueError(f"{file}: {option} must be true or false, got {config[option]!r}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE):
        raise ValueError(
            f"{file}: init_lora_weights = {init!r} changes the base's weights when it is loaded, "
            "so that the adapter alone does not say what it adds; convert it with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    _check_numbers(file, config, "r", "rank_pattern", _is_rank, "a positive whole number")
    _check_numbers(file, config, "lora_alpha", "alpha_pattern", _is_finite, "a finite number")
    for option in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(option)
        if isinstance(value, str) and option != "layers_pattern":
            _check_pattern(f"{file}: {option}", value, value)
        elif isinstance(value, str):
            _check_layers_pattern(file, value)
        elif value is not None and option == "layers_pattern" and _is_list_of(value, str):
            for pattern in value:
                _check_layers_pattern(file, pattern)
        elif value is not None and not _is_list_of(value, str):
            raise ValueError(f"{file}: {option} must be a string or strings, got {value!r}")
    for option in ("target_parameters", "modules_to_save"):
        value = config.get(option)
        if value is not None and not _is_list_of(value, str):
            raise ValueError(f"{file}: {option} must be strings, got {value!r}")
    layers = config.get("layers_to_transform")
    if layers is not None and type(layers) is not int and not _is_list_of(layers, int):
        raise ValueError(f"{file}: layers_to_transform must be an int or ints, got {layers!r}")


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Return whether PEFT applies an adapter with this config to the layer ``name``.

    Example:
        >>> config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
        >>> [is_targeted(config, f"model.layers.{layer}.self_attn.q_proj") for layer in (0, 1)]
        [False, True]
    """
    if _names(config.get("exclude_modules"), name):
        return False
    targets = config.get("target_modules")
    if targets is not None and targets != ALL_LINEAR and not _names(targets, name):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == [] or (isinstance(targets, list) and name in targets):
        return True
    patterns = config.get("layers_pattern") or "[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(LAYER.format(pattern), name)
        if match:
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def rank_of(config: Mapping[str, Any], name: str) -> int:
    """Return the rank of the layer ``name``: that of the first pattern that matches, or ``r``."""
    return int(_by_pattern(config.get("rank_pattern"), name, config["r"]))


def scaling_of(config: Mapping[str, Any], name: str) -> float:
    """Return the scaling of the layer ``name``: alpha / rank, or alpha / sqrt(rank) with rslora.

    Example:
        >>> scaling_of({"r": 12, "lora_alpha": 8}, "model.layers.0.mlp.up_proj")
        0.6666666666666666
    """
    alpha, rank = (
        _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]),
        rank_of(config, name),
    )
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _names(targets: Any, name: str) -> bool:
    """Return whether ``targets``, a regular expression or a list of endings, matches ``name``."""
    if not targets:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


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


def _check_pattern(where: str, pattern: str, used: str) -> re.Pattern[str]:
    """Compile ``used``, the regular expression that PEFT makes from ``pattern``."""
    try:
        return re.compile(used)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def _check_layers_pattern(file: Path, pattern: str) -> None:
    where = f"{file}: layers_pattern"
    if _check_pattern(where, pattern, LAYER.format(pattern)).groups != 1:
        raise ValueError(f"{where}: {pattern!r} must have no groups: PEFT takes the first")


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: object) -> bool:
    if type(value) is int:
        return abs(value) < 2**1023
    return type(value) is float and math.isfinite(value)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
