"""What a checkpoint says about adapters: ``lora_compatible`` and ``lora_target_modules``.

They stand in ``config.json``, at its top or in its ``quantization_config``, or in
``lora_metadata.json`` beside it. Neither compressed-tensors nor llm-compressor writes them itself.

Source: the request this project began with names the three.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FILE", "LoRAMetadata", "outside_targets", "read_metadata"]

FILE = "lora_metadata.json"


@dataclass(frozen=True)
class LoRAMetadata:
    """What a checkpoint says about adapters.

    Args:
        compatible: ``lora_compatible``, or None where nothing is said.
        target_modules: ``lora_target_modules``, the last parts of modules' names, or None.
    """

    compatible: bool | None = None
    target_modules: tuple[str, ...] | None = None


def read_metadata(config: Mapping[str, Any], folder: Path | None = None) -> LoRAMetadata:
    """Read what a checkpoint says about adapters.

    Args:
        config: the whole ``config.json``.
        folder: where ``lora_metadata.json`` may lie, or None for a checkpoint that is no folder.

    Raises:
        TypeError: a value of the wrong type; the message names the place.
        ValueError: a file that is no JSON object, or two places that contradict.

    Example:
        >>> read_metadata({"lora_compatible": True, "lora_target_modules": ["q_proj"]})
        LoRAMetadata(compatible=True, target_modules=('q_proj',))
    """
    found: dict[str, tuple[str, Any]] = {}
    for place, mapping in _places(config, folder):
        for key, value in (
            ("lora_compatible", _flag(place, mapping.get("lora_compatible"))),
            ("lora_target_modules", _names(place, mapping.get("lora_target_modules"))),
        ):
            if value is None:
                continue
            before = found.setdefault(key, (place, value))
            if before[1] != value:
                raise ValueError(
                    f"{key} is {before[1]!r} in {before[0]} and {value!r} in {place}: "
                    "make them the same"
                )
    compatible = found.get("lora_compatible", ("", None))[1]
    return LoRAMetadata(compatible, found.get("lora_target_modules", ("", None))[1])


def outside_targets(metadata: LoRAMetadata, module: str, parts: tuple[str, ...]) -> list[str]:
    """Return which of a layer's parts ``lora_target_modules`` leaves out.

    Args:
        metadata: what the checkpoint says.
        module: the layer's full name.
        parts: the last names of what it is merged of, or its own last name.
    """
    if metadata.target_modules is None:
        return []
    named = set(metadata.target_modules)
    if module in named or module.rpartition(".")[2] in named:
        return []
    return [part for part in parts if part not in named]


def _places(
    config: Mapping[str, Any], folder: Path | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "config.json", config
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping):
        yield "quantization_config of config.json", quantization
    file = None if folder is None else folder / FILE
    if file is not None and file.is_file():
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: no JSON: {error}") from error
        if not isinstance(read, Mapping):
            raise ValueError(f"{file}: must be a JSON object, got {type(read).__name__}")
        yield str(file), read


def _flag(place: str, value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{place}: lora_compatible must be true or false, got {value!r}")
    return value


def _names(place: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{place}: lora_target_modules must be a list of names, got {value!r}")
    return tuple(value)
