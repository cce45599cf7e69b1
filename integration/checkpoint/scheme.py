"""Read how each module is quantised, from ``quantization_config`` in a checkpoint's config.json.

Only fields that have been stable since compressed-tensors 0.9 are read; the rest is ignored. This
module does not import compressed-tensors; tests compare its result with compressed-tensors'
classes.

Source: ``compressed_tensors/quantization/quant_args.py``, ``quant_scheme.py`` and
``quant_config.py``, 0.9 to 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int4_lora.integration.checkpoint.quantization_config import (
    METHOD,
    method_of,
    read_quantization,
)
from int4_lora.integration.checkpoint.target_matching import compile_targets, group_of

if TYPE_CHECKING:
    from int4_lora.reference import PackedWeight

__all__ = [
    "PACKED_FORMAT",
    "Scheme",
    "check_strategy",
    "read_actorder",
    "read_groups",
    "read_schemes",
]

PACKED_FORMAT = "pack-quantized"
FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "marlin-24",
    "mixed-precision",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    PACKED_FORMAT,
    "sparse-24-bitmask",
    "sparse-bitmask",
)
TYPES = ("int", "float")
GROUPED = ("group", "tensor_group")
STRATEGIES = ("tensor", "channel", *GROUPED, "block", "token", "attn_head")
DYNAMIC_STRATEGIES = ("token", "tensor", *GROUPED)
ACTORDERS = {"group": "group", "dynamic": "group", "weight": "weight", "static": "weight"}

# The weight fields of each preset, as compressed-tensors 0.20 defines them.
BY_GROUP = {"strategy": "group", "group_size": 128}
FLOAT = {"num_bits": 8, "type": "float"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MXFP = {"type": "float", "strategy": "group", "group_size": 32}
PRESETS: dict[str, dict[str, Any] | None] = {
    "UNQUANTIZED": None,
    "W8A8": {"num_bits": 8, "strategy": "channel"},
    "INT8": {"num_bits": 8, "strategy": "channel"},
    **{f"W{bits}A16": {"num_bits": bits, **BY_GROUP} for bits in range(2, 9)},
    **{f"W{bits}A8": {"num_bits": bits, **BY_GROUP} for bits in range(2, 8)},
    **{f"W{bits}A4": {"num_bits": bits, **BY_GROUP} for bits in range(2, 5)},
    "W4A16_ASYM": {"num_bits": 4, **BY_GROUP, "symmetric": False},
    "W4AFP8": {"num_bits": 4, **BY_GROUP},
    "FP8": {**FLOAT, "strategy": "tensor"},
    "FP8_DYNAMIC": {**FLOAT, "strategy": "channel"},
    "FP8_BLOCK": {**FLOAT, "strategy": "block", "block_structure": [128, 128]},
    "NVFP4A16": NVFP4,
    "NVFP4": NVFP4,
    "MXFP4A16": {"num_bits": 4, **MXFP},
    "MXFP4": {"num_bits": 4, **MXFP},
    "MXFP4XFP8": {"num_bits": 4, **MXFP},
    "MXFP6A16": {"num_bits": 6, **MXFP},
    "MXFP6A8": {"num_bits": 6, **MXFP},
    "MXFP8A16": {"num_bits": 8, **MXFP},
    "MXFP8": {"num_bits": 8, **MXFP},
}
WEIGHT_ONLY = re.compile(r".*A16(_ASYM)?")  # names of presets that do not quantise activations


@dataclass(frozen=True)
class Scheme:
    """The quantisation of one module.

    Args:
        format: "pack-quantized", another of compressed-tensors', "gptq", "gptq_v2" or "awq".
        kind: "int" or "float".
        bits: bits of a code.
        symmetric: whether the weight has no zero-points.
        strategy: "tensor", "channel", "group", "block", or a strategy of another format.
        group_size: as in ``PackedWeight``: columns, (rows, columns) of a block, or None.
        actorder: the activation order: "group" with a g_idx, "weight", or None.
        activations: whether inputs or outputs are quantised too, which this package does not
            support.
    """

    format: str
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | tuple[int, int] | None
    actorder: str | None
    activations: bool


def read_schemes(
    file: Path, config: Mapping[str, Any], modules: Iterable[str]
) -> dict[str, Scheme]:
    """Return the scheme of each quantised module.

    If several targets of the config groups match a module, an exact name takes precedence over a
    regular expression, and a regular expression over a class.

    Args:
        file: config.json, for the messages.
        config: the content of config.json.
        modules: the names of the modules whose tensors are quantised.

    Returns:
        The schemes by module name, in the order given.

    Raises:
        ValueError: quantization_config is missing, is of another method or cannot be read, or no
            group targets a module; the message names the field and its value.
    """
    schemes, targets = read_groups(file, config)
    matches = compile_targets(file, targets)
    return {module: schemes[group_of(file, module, matches)] for module in modules}


def read_groups(
    file: Path, config: Mapping[str, Any]
) -> tuple[dict[str, Scheme], dict[str, list[str]]]:
    """Return the scheme and the targets of each config group that quantises weights, by its name.

    Args:
        file: config.json, for the messages.
        config: the content of config.json.

    Raises:
        ValueError: as in ``read_schemes``.
    """
    quantization = read_quantization(file, config)
    if method_of(quantization) != METHOD:
        method = method_of(quantization)
        raise ValueError(f"{file}: quant_method must be {METHOD!r} here, got {method!r}")
    transforms = quantization.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise ValueError(
            f"{file}: transform_config rotates weights and activations, which this package "
            f"does not do, got config_groups {list(transforms['config_groups'])}"
        )
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict):
        raise ValueError(f"{file}: config_groups must be an object, got {groups!r}")
    schemes: dict[str, Scheme] = {}
    targets: dict[str, list[str]] = {}
    for name, group in groups.items():
        where = f"{file}: config_groups.{name}"
        try:
            scheme = _read_group(name, group, quantization.get("format"))
            if scheme is not None:
                schemes[name], targets[name] = scheme, _read_targets(group)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return schemes, targets


def read_actorder(value: object) -> str | None:
    """Return an ``actorder`` field as "group", "weight" or None.

    Example:
        >>> [read_actorder(value) for value in ("dynamic", "static", True, None)]
        ['group', 'weight', 'group', None]
    """
    if value is None or isinstance(value, bool):
        return "group" if value else None
    if isinstance(value, str) and value.lower() in ACTORDERS:
        return ACTORDERS[value.lower()]
    raise ValueError(f"weights.actorder must be one of {[*ACTORDERS]} or null, got {value!r}")


def check_strategy(scheme: Scheme, weight: PackedWeight) -> None:
    """Check that a weight's tensors have the strategy that the config states.

    Raises:
        ValueError: the tensors have another strategy.
    """
    one_group = scheme.strategy == "group" and weight.strategy == "channel"
    if weight.strategy != scheme.strategy and not one_group:
        raise ValueError(
            f"scale has the shape of strategy {weight.strategy!r}, "
            f"config.json says {scheme.strategy!r}"
        )


def _read_group(name: str, group: object, common_format: object) -> Scheme | None:
    """Return the scheme of a config group, or None if the group does not quantise weights.

    Args:
        name: the group's name; the preset's name if the group is a list of targets.
        group: the group's value in config.json.
        common_format: the format of groups without a ``format`` field.
    """
    own_format = None
    if isinstance(group, list):
        if name.upper() not in PRESETS:
            raise ValueError(f"no such preset: the presets are {', '.join(PRESETS)}")
        weights: Any = PRESETS[name.upper()]
        activations = WEIGHT_ONLY.fullmatch(name.upper()) is None
    elif isinstance(group, dict):
        weights = group.get("weights")
        activations = any(group.get(f"{side}_activations") for side in ("input", "output"))
        own_format = group.get("format")
    else:
        raise ValueError(f"a config group must be an object or a list of targets, got {group!r}")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise ValueError(f"weights must be an object, got {weights!r}")
    format_ = own_format or common_format
    if format_ not in FORMATS:
        raise ValueError(f"format must be one of compressed-tensors', got {format_!r}")
    symmetric = _given(weights, "symmetric", True)
    if type(symmetric) is not bool:
        raise ValueError(f"weights.symmetric must be true or false, got {symmetric!r}")
    bits = _given(weights, "num_bits", 8)
    if type(bits) is not int or bits < 1:
        raise ValueError(f"weights.num_bits must be a positive whole number, got {bits!r}")
    kind = _choice(weights, "type", TYPES) or "int"
    strategy, group_size = _read_strategy(weights)
    return Scheme(
        format=str(format_),
        kind=kind,
        bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size,
        actorder=read_actorder(weights.get("actorder")),
        activations=activations,
    )


def _read_targets(group: Any) -> list[str]:
    targets = group if isinstance(group, list) else group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"targets must be a list of names, got {targets!r}")
    return targets


def _read_strategy(weights: Mapping[str, Any]) -> tuple[str, int | tuple[int, int] | None]:
    """Return the strategy and its group_size: columns, (rows, columns) of a block, or None."""
    size = _given(weights, "group_size", None)
    if size is not None and (type(size) is not int or size < -1):
        raise ValueError(f"weights.group_size must be a whole number or null, got {size!r}")
    inferred = {None: "tensor", -1: "channel", 0: None}.get(size, "group")
    strategy = _choice(weights, "strategy", STRATEGIES) or inferred
    if strategy is None or (strategy in GROUPED and (size is None or size < 1)):
        name = strategy or "group"
        raise ValueError(f"weights: strategy {name} requires a positive group_size, got {size!r}")
    if strategy not in GROUPED and size is not None and size > 0:
        raise ValueError(f"weights: group_size requires strategy group, got {strategy!r}")
    _check_dynamic(weights, strategy)
    structure = weights.get("block_structure")
    if strategy != "block":
        if structure is not None:
            raise ValueError(f"weights: block_structure requires strategy block, got {strategy!r}")
        return strategy, size if strategy in GROUPED else None
    lengths = structure
    if isinstance(structure, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", structure, re.ASCII):
        lengths = [int(length) for length in structure.split("x")]
    if (
        not isinstance(lengths, list)
        or len(lengths) != 2
        or not all(type(length) is int and length > 0 for length in lengths)
    ):
        raise ValueError(
            f"weights: strategy block requires a block_structure of two lengths, got {structure!r}"
        )
    return strategy, (lengths[0], lengths[1])


def _check_dynamic(weights: Mapping[str, Any], strategy: str) -> None:
    dynamic = weights.get("dynamic")
    if dynamic is not None and type(dynamic) is not bool and dynamic != "local":
        raise ValueError(f"weights.dynamic must be true, false or 'local', got {dynamic!r}")
    allowed = ("tensor_group",) if dynamic == "local" else DYNAMIC_STRATEGIES
    if dynamic and strategy not in allowed:
        raise ValueError(f"weights: dynamic = {dynamic!r} does not go with strategy {strategy!r}")
    if strategy == "token" and not dynamic:
        raise ValueError("weights: strategy token requires dynamic = true")


def _choice(weights: Mapping[str, Any], field: str, choices: tuple[str, ...]) -> str | None:
    value = weights.get(field)
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in choices:
        raise ValueError(f"weights.{field} must be one of {list(choices)}, got {value!r}")
    return value.lower()


def _given(weights: Mapping[str, Any], field: str, default: Any) -> Any:
    """Return a field's value, or the default if the field is missing or null."""
    value = weights.get(field)
    return default if value is None else value
