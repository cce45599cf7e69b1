"""One config group of ``quantization_config``, as compressed-tensors' own classes understand it.

Importing those classes imports transformers, which takes longer than inspecting a 70B checkpoint.
What they made of a group is therefore remembered, by the group and the version installed.

Source: ``compressed_tensors/quantization/quant_config.py`` and ``quant_scheme.py``, 0.9 to 0.20.
"""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from int4_lora.disk_cache import recall, remember

__all__ = ["ConfigGroup", "parse_group", "upstream_scheme"]

MEANING = ("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic")
TYPES = {  # of the fields of a ConfigGroup, as JSON has them
    "targets": (list,),
    "kind": (str,),
    "bits": (int,),
    "symmetric": (bool,),
    "strategy": (str,),
    "group_size": (int, type(None)),
    "block_structure": (str, list, type(None)),
    "activations": (bool,),
}
READER = 1  # counts up when this file reads something else out of a group


@dataclass(frozen=True)
class ConfigGroup:
    """What a config group says of weights.

    Args:
        targets: names, "re:" patterns and classes of modules.
        kind: "int" or "float".
        bits: bits of a code.
        symmetric: whether there are no zero-points.
        strategy: "tensor", "channel", "group", "block", or a strategy of another format.
        group_size: columns of a group, where the strategy has such.
        block_structure: rows and columns of a block, as they are written.
        activations: whether inputs or outputs are quantised too.
    """

    targets: list[str]
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None
    block_structure: str | list[int] | None
    activations: bool


def parse_group(name: str, group: dict[str, Any] | list[Any]) -> ConfigGroup | None:
    """Return what a config group says of weights, or None if it leaves them alone.

    Args:
        name: its name, which is that of a preset where the group is a list of targets.
        group: as config.json has it.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: compressed-tensors does not take it.
    """
    if isinstance(group, dict) and group.get("weights") is None:
        return None
    try:
        installed = version("compressed-tensors")
    except PackageNotFoundError as error:
        raise _missing("compressed-tensors") from error
    key = {"reader": READER, "compressed-tensors": installed, "name": name, "group": group}
    kept = recall("config-groups", key)
    if _is_one(kept):
        return ConfigGroup(**kept)
    parsed = upstream_scheme(name, group)
    weights = parsed.weights
    if weights is None:
        return None
    both = [getattr(parsed, f"{side}_activations") for side in ("input", "output")]
    if isinstance(group, dict):
        both = [group.get(f"{side}_activations") for side in ("input", "output")]
    found = ConfigGroup(
        targets=[str(target) for target in parsed.targets],
        kind=_plain(weights.type),
        bits=int(weights.num_bits),
        symmetric=bool(weights.symmetric),
        strategy=_plain(weights.strategy),
        group_size=weights.group_size,
        block_structure=weights.block_structure,
        activations=any(both),
    )
    remember("config-groups", key, asdict(found))
    return found


def upstream_scheme(name: str, group: dict[str, Any] | list[Any]) -> Any:
    """Return compressed-tensors' ``QuantizationScheme`` for a config group.

    Fields that the installed version does not know yet, or no longer takes, do not matter: an old
    version reads a new config, and a new one an old config.

    Args:
        name: its name, which is that of a preset where the group is a list of targets.
        group: as config.json has it.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: compressed-tensors does not take it.
    """
    try:
        upstream = importlib.import_module("compressed_tensors.quantization")
    except ModuleNotFoundError as error:
        raise _missing(error.name) from error
    if isinstance(group, list):
        try:
            return upstream.preset_name_to_scheme(name, group)
        except (KeyError, ValueError) as error:
            raise ValueError(f"no such preset: {_in_one_line(error)}") from error
    given = group["weights"]
    if not isinstance(given, dict):
        raise ValueError(f"weights must be an object, got {given!r}")
    meaning = {key: given[key] for key in MEANING if given.get(key) is not None}
    try:
        weights = upstream.QuantizationArgs(**meaning)
        return upstream.QuantizationScheme(targets=group.get("targets"), weights=weights)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_in_one_line(error)}, got weights {meaning}") from error


def _is_one(kept: Any) -> bool:
    """Return whether what was kept has the fields of a ConfigGroup, of their types."""
    if not isinstance(kept, dict) or kept.keys() != TYPES.keys():
        return False
    right = all(type(kept[name]) in types for name, types in TYPES.items())
    return right and all(isinstance(target, str) for target in kept["targets"])


def _missing(package: str | None) -> ImportError:
    return ImportError(
        f"{package} is needed to read checkpoints: pip install 'int4-lora[checkpoints]'"
    )


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _in_one_line(error: Exception) -> str:
    """Return the first of pydantic's findings, or any other error as it is."""
    findings = getattr(error, "errors", None)
    if findings is None:
        return str(error)
    first = findings()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
