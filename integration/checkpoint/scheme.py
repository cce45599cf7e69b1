"""How each module is quantised, from ``quantization_config`` in a checkpoint's config.json.

What a weight's numbers mean has been written the same way since compressed-tensors 0.9; what
surrounds it comes and goes: only those fields are read.

Source: ``compressed_tensors/quantization/quant_config.py`` and ``quant_scheme.py``, 0.9 to 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int4_lora.integration.checkpoint.config_groups import ConfigGroup, parse_group, upstream_scheme
from int4_lora.integration.checkpoint.target_matching import compile_targets, group_of
from int4_lora.reference import PackedWeight

__all__ = ["PACKED_FORMAT", "Scheme", "check_strategy", "read_quantization", "read_schemes"]

PACKED_FORMAT = "pack-quantized"
METHOD = "compressed-tensors"
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second up to 0.9
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
CONVERTERS = {
    "awq": "convert it with AutoAWQConverter of compressed_tensors.entrypoints.convert",
    "gptq": "quantise the dense model again with llm-compressor's GPTQModifier",
}


@dataclass(frozen=True)
class Scheme:
    """How one module's weight is stored.

    Args:
        format: "pack-quantized", or another of compressed-tensors' formats.
        kind: "int" or "float".
        bits: bits of a code.
        symmetric: whether there are no zero-points.
        strategy: "tensor", "channel", "group", "block", or a strategy of another format.
        group_size: as in ``PackedWeight``: columns, (rows, columns) of a block, or None.
        actorder: what config.json says of the order of columns, "group" for one with g_idx.
        activations: whether inputs or outputs are quantised too, which this package does not do.
        config_group: the name and content of the config group that says so.
    """

    format: str
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | tuple[int, int] | None
    actorder: str | None
    activations: bool
    config_group: tuple[str, Any]

    @property
    def upstream(self) -> Any:
        """compressed-tensors' own ``QuantizationScheme``, for its own functions."""
        return upstream_scheme(*self.config_group)


def read_schemes(
    file: Path, config: Mapping[str, Any], modules: Iterable[str]
) -> dict[str, Scheme]:
    """Return the scheme of each quantised module.

    An exact name among the targets of a group beats a regular expression, which beats a class.

    Args:
        file: config.json, for the messages.
        config: its content.
        modules: the names of the modules whose tensors are quantised.

    Returns:
        The schemes by module name, in the order given.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: no quantization_config, one of another method, or one that cannot be read, or
            a module that no group targets.
    """
    raw = read_quantization(file, config)
    transforms = raw.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise ValueError(
            f"{file}: transform_config rotates weights and activations, which this package "
            f"does not do, got config_groups {list(transforms['config_groups'])}"
        )
    groups = raw.get("config_groups")
    if not isinstance(groups, dict):
        raise ValueError(f"{file}: config_groups must be an object, got {groups!r}")
    schemes: dict[str, Scheme] = {}
    targets: dict[str, list[str]] = {}
    for name, group in groups.items():
        where = f"{file}: config_groups.{name}"
        found = _as_scheme(where, name, group, raw)
        if found is not None:
            schemes[name], targets[name] = found
    matches = compile_targets(file, targets)
    return {module: schemes[group_of(file, module, matches)] for module in modules}


def read_quantization(file: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of config.json that speaks of quantisation.

    Args:
        file: config.json, for the messages.
        config: its content.

    Raises:
        ValueError: there is none, or it is of another method than compressed-tensors.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in CONFIG_KEYS:
            if key not in part:
                continue
            raw = part[key]
            if not isinstance(raw, dict):
                raise ValueError(f"{file}: {key} must be an object, got {raw!r}")
            method = raw.get("quant_method", METHOD if key == CONFIG_KEYS[1] else None)
            if method != METHOD:
                hint = CONVERTERS.get(method) if isinstance(method, str) else None
                found = f"{method!r}" + (f": {hint}" if hint else "")
                raise ValueError(f"{file}: quant_method must be {METHOD!r}, got {found}")
            return raw
    raise ValueError(f"{file}: quantization_config is missing: not a quantised checkpoint")


def _as_scheme(
    where: str, name: str, group: object, raw: Mapping[str, Any]
) -> tuple[Scheme, list[str]] | None:
    """Return a config group as a scheme and its targets, or None if it leaves weights alone."""
    if not isinstance(group, dict | list):
        raise ValueError(f"{where} must be an object or a list of targets, got {group!r}")
    try:
        parsed = parse_group(name, group)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if parsed is None:
        return None
    stored, actorder = None, None
    if isinstance(group, dict):
        stored, actorder = group.get("format"), group["weights"].get("actorder")
    form = stored or raw.get("format")
    if form not in FORMATS:
        raise ValueError(f"{where}: format must be one of compressed-tensors', got {form!r}")
    scheme = Scheme(
        format=str(form),
        kind=parsed.kind,
        bits=parsed.bits,
        symmetric=parsed.symmetric,
        strategy=parsed.strategy,
        group_size=_group_size(where, parsed),
        actorder={"True": "group", "False": None, "None": None}.get(str(actorder), str(actorder)),
        activations=parsed.activations,
        config_group=(name, group),
    )
    return scheme, parsed.targets


def _group_size(where: str, group: ConfigGroup) -> int | tuple[int, int] | None:
    """Return columns of a group, or the (rows, columns) of "128x128" or [128, 128]."""
    if group.strategy == "group":
        return group.group_size
    if group.strategy != "block":
        return None
    structure = group.block_structure
    parts = structure.split("x") if isinstance(structure, str) else structure
    try:
        rows, columns = (int(part) for part in parts or ())
    except (TypeError, ValueError):
        rule = "block_structure must be two lengths"
        raise ValueError(f"{where}: {rule}, got {structure!r}") from None
    return rows, columns


def check_strategy(scheme: Scheme, weight: PackedWeight) -> None:
    """Check that a weight's tensors have the strategy that the config states.

    Raises:
        ValueError: they have another one.
    """
    one_group = scheme.strategy == "group" and weight.strategy == "channel"
    if weight.strategy != scheme.strategy and not one_group:
        raise ValueError(
            f"scale has the shape of strategy {weight.strategy!r}, "
            f"config.json says {scheme.strategy!r}"
        )
