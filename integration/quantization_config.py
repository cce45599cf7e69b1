"""How each module is quantised, from ``quantization_config`` in a checkpoint's config.json.

compressed-tensors' own classes parse and validate it, so that what they accept is accepted here.

Source: ``compressed_tensors/quantization/quant_config.py`` and ``quant_scheme.py``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int4_lora.reference import PackedWeight

__all__ = ["Scheme", "check_strategy", "read_schemes"]

PACKED_FORMAT = "pack-quantized"
CLASS_TARGETS = ("Linear", "Embedding")


@dataclass(frozen=True)
class Scheme:
    """How one module's weight is stored.

    Args:
        bits: bits of a code.
        symmetric: whether there are no zero-points.
        strategy: "tensor", "channel", "group" or "block".
        group_size: as in ``PackedWeight``: columns, (rows, columns) of a block, or None.
        upstream: compressed-tensors' own ``QuantizationScheme``, for its own functions.
    """

    bits: int
    symmetric: bool
    strategy: str
    group_size: int | tuple[int, int] | None
    upstream: Any


def read_schemes(
    file: Path, config: Mapping[str, Any], modules: Iterable[str]
) -> dict[str, Scheme]:
    """Return the scheme of each packed module.

    An exact name among the targets of a group beats a regular expression, which beats a class.

    Args:
        file: config.json, for the messages.
        config: its content.
        modules: the names of the modules that have a ``weight_packed``.

    Returns:
        The schemes by module name, in the order given.

    Raises:
        ImportError: compressed-tensors is not installed.
        ValueError: no quantization_config, one of another method or format, or a module that no
            group targets.
    """
    raw = config.get("quantization_config")
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: quantization_config must be an object, got {raw!r}")
    if raw.get("quant_method") != "compressed-tensors":
        method = raw.get("quant_method")
        raise ValueError(f"{file}: quant_method must be 'compressed-tensors', got {method!r}")
    try:
        upstream = importlib.import_module("compressed_tensors.quantization")
    except ImportError as error:
        raise ImportError(
            "compressed-tensors is needed to read checkpoints: pip install 'int4-lora[checkpoints]'"
        ) from error
    try:
        parsed = upstream.QuantizationConfig.model_validate(raw)
    except ValueError as error:
        raise ValueError(f"{file}: quantization_config: {_in_one_line(error)}") from error
    groups = {name: _as_scheme(file, name, group, raw) for name, group in _groups(parsed)}
    targets = {name: list(group.targets) for name, group in _groups(parsed)}
    return {module: groups[_group_of(file, module, targets)] for module in modules}


def _in_one_line(error: ValueError) -> str:
    """Return the first of pydantic's findings, or any other error as it is."""
    findings = getattr(error, "errors", None)
    if findings is None:
        return str(error)
    first = findings()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _groups(parsed: Any) -> list[tuple[str, Any]]:
    return [(name, group) for name, group in parsed.config_groups.items() if group.weights]


def _group_of(file: Path, module: str, targets: Mapping[str, list[str]]) -> str:
    def exact(target: str) -> bool:
        return target == module

    def pattern(target: str) -> bool:
        if not target.startswith("re:"):
            return False
        try:
            return bool(re.match(target.removeprefix("re:"), module))
        except re.error as error:
            raise ValueError(f"{file}: config_groups: target {target!r}: {error}") from error

    def class_name(target: str) -> bool:
        return target in CLASS_TARGETS

    for rule in (exact, pattern, class_name):
        for name, group in targets.items():
            if any(rule(target) for target in group):
                return name
    raise ValueError(f"{file}: {module} is packed, but no config group targets it")


def _as_scheme(file: Path, name: str, group: Any, raw: Mapping[str, Any]) -> Scheme:
    weights = group.weights
    where = f"{file}: config_groups.{name}"
    stored = getattr(group, "format", None) or raw.get("format")
    stored = str(getattr(stored, "value", stored))
    if stored != PACKED_FORMAT:
        raise ValueError(f"{where}: format must be {PACKED_FORMAT!r}, got {stored!r}")
    kind = str(getattr(weights.type, "value", weights.type))
    if kind != "int" or weights.num_bits not in (4, 8):
        raise ValueError(
            f"{where}: weights must be int of 4 or 8 bits, got {kind} of {weights.num_bits}"
        )
    strategy = str(getattr(weights.strategy, "value", weights.strategy))
    if strategy not in ("tensor", "channel", "group", "block"):
        raise ValueError(
            f"{where}: strategy must be tensor, channel, group or block, got {strategy!r}"
        )
    size: int | tuple[int, int] | None = None
    if strategy == "group":
        size = int(weights.group_size)
    if strategy == "block":
        rows, columns = weights.block_structure
        size = (int(rows), int(columns))
    return Scheme(int(weights.num_bits), bool(weights.symmetric), strategy, size, group)


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
