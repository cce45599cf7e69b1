"""Find what config.json says about the quantisation, at any depth.

Models with several towers describe it at the top, in the text model's part, or in both.

Source: ``quantization_config`` of transformers' ``PretrainedConfig``; ``compression_config`` of
compressed-tensors up to 0.9.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "ANNOTATIONS",
    "CONFIG_KEYS",
    "METHOD",
    "METHODS",
    "method_of",
    "parts_of",
    "quantizations",
    "read_quantization",
]

METHOD = "compressed-tensors"
METHODS = (METHOD, "awq", "gptq")
OLD_KEY = "compression_config"
CONFIG_KEYS = ("quantization_config", OLD_KEY)
ANNOTATIONS = ("lora_compatible", "lora_target_modules", "suggested_lora_targets")
BITSANDBYTES = "its codes are packed for its own kernels: quantise the dense model another way"
HINTS = {"bitsandbytes": BITSANDBYTES, "bitsandbytes_4bit": BITSANDBYTES}


def parts_of(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield every object of a config, and its path, the outermost first.

    What describes the quantisation is not entered.

    Args:
        config: the content of config.json, or a part of it.

    Example:
        >>> [path for path, part in parts_of({"text_config": {"rope": {}}})]
        ['', 'text_config.', 'text_config.rope.']
    """
    waiting: list[tuple[str, Any]] = [("", config)]
    for path, part in waiting:  # grows meanwhile; a call per level would limit the depth
        if isinstance(part, dict):
            yield path, part
            inner = [(f"{path}{key}.", part[key]) for key in part if key not in CONFIG_KEYS]
        else:
            inner = [(f"{path}{place}.", value) for place, value in enumerate(part)]
        waiting += [(name, value) for name, value in inner if isinstance(value, (dict, list))]


def quantizations(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value that describes a quantisation, by its path, the outermost first.

    A value of null says that there is none.

    Args:
        config: the content of config.json.

    Example:
        >>> quantizations({"text_config": {"quantization_config": {"format": "dense"}}})
        {'text_config.quantization_config': {'format': 'dense'}}
    """
    return {
        path + key: part[key]
        for path, part in parts_of(config)
        for key in CONFIG_KEYS
        if part.get(key) is not None
    }


def read_quantization(file: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that describes the quantisation.

    Args:
        file: config.json, for the messages.
        config: the content of config.json.

    Raises:
        ValueError: config.json does not describe a quantisation, describes two, or describes
            another method than those of ``METHODS``.
    """
    found = quantizations(config)
    if not found:
        raise ValueError(f"{file}: quantization_config is missing: not a quantised checkpoint")
    for path, value in found.items():
        _check_method(file, path, value)
    (first, quantization), *others = found.items()
    for path, value in others:
        if _meaning(value) != _meaning(quantization):
            raise ValueError(
                f"{file}: {first} and {path} must be equal, but describe different quantisations"
            )
    return dict(quantization)


def method_of(quantization: Mapping[str, Any]) -> str:
    """Return the method of a quantisation that ``read_quantization`` returned."""
    return str(quantization.get("quant_method", METHOD))


def _check_method(file: Path, path: str, quantization: object) -> None:
    if not isinstance(quantization, dict):
        raise ValueError(f"{file}: {path} must be an object, got {quantization!r}")
    method = quantization.get("quant_method", METHOD if path.endswith(OLD_KEY) else None)
    if method not in METHODS:
        hint = HINTS.get(method) if isinstance(method, str) else None
        shown = f"{method!r}" + (f": {hint}" if hint else "")
        known = f"{', '.join(map(repr, METHODS[:-1]))} or {METHODS[-1]!r}"
        raise ValueError(f"{file}: quant_method must be {known}, got {shown}")


def _meaning(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two descriptions must have in common: all but what annotate writes."""
    members = {"quant_method": METHOD, **quantization}
    return {key: value for key, value in members.items() if key not in ANNOTATIONS}
