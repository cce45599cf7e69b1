"""What a checkpoint says about adapters: ``lora_compatible`` and ``lora_target_modules``.

They stand in ``config.json``, at the top level or in ``quantization_config``, or in
``lora_metadata.json`` beside it. ``int4-lora annotate`` writes them; compressed-tensors and
llm-compressor do not.

Source: ``docs/vllm.md``.
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
        compatible: ``lora_compatible``, or None where it is absent.
        target_modules: ``lora_target_modules``, whole names or last parts, or None.
    """

    compatible: bool | None = None
    target_modules: tuple[str, ...] | None = None


def read_metadata(config: Mapping[str, Any], folder: Path | None = None) -> LoRAMetadata:
    """Read what a checkpoint says about adapters.

    Args:
        config: the whole ``config.json``.
        folder: where to look for ``lora_metadata.json``, or None.

    Raises:
        TypeError: a value has the wrong type; the message names the place.
        ValueError: the file is no JSON object, or two places contradict each other.

    Example:
        >>> read_metadata({"lora_compatible": True, "lora_target_modules": ["q_proj"]})
        LoRAMetadata(compatible=True, target_modules=('q_proj',))
    """
    first: dict[str, tuple[str, Any]] = {}
    for place, mapping in _places(config, folder):
        for key, value in (
            ("lora_compatible", _flag(place, mapping.get("lora_compatible"))),
            ("lora_target_modules", _names(place, mapping.get("lora_target_modules"))),
        ):
            if value is None:
                continue
            first_place, first_value = first.setdefault(key, (place, value))
            if first_value != value:
                raise ValueError(
                    f"{key} is {first_value!r} in {first_place} and {value!r} in {place}: "
                    "make them the same"
                )
    compatible = first.get("lora_compatible", ("", None))[1]
    return LoRAMetadata(compatible, first.get("lora_target_modules", ("", None))[1])


def outside_targets(metadata: LoRAMetadata, module: str, parts: tuple[str, ...]) -> list[str]:
    """Return the parts of a layer that ``lora_target_modules`` does not name.

    Args:
        metadata: what the checkpoint says.
        module: the layer's full name.
        parts: the last names of the modules it is merged of, or its own last name.
    """
    if metadata.target_modules is None:
        return []
    targets = set(metadata.target_modules)
    if module in targets or module.rpartition(".")[2] in targets:
        return []
    return [part for part in parts if part not in targets]


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
            written = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{file} is no JSON ({error}): write it again with int4-lora annotate, or remove it"
            ) from error
        if not isinstance(written, Mapping):
            raise ValueError(f"{file}: must be a JSON object, got {type(written).__name__}")
        yield str(file), written


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
