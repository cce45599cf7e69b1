"""Choose a layer's formulation: the fastest one measured on this machine, else the default.

Source: ``benchmarks/results`` for the defaults; ``tuning.py`` measures.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.formulations import (
    DEFINITION,
    FORMULATIONS,
    GEMV,
    INT4PACK,
    INT8PACK,
    MAGIC_GEMV,
    SPLIT_K,
    TILES,
    Formulation,
)
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.disk_cache import recall, remember

__all__ = [
    "AS_USUAL",
    "candidates",
    "choose",
    "default",
    "device_name",
    "keep_crossovers",
    "kept_crossovers",
    "takes",
]

CACHE = "crossovers"
FORMAT = 8  # increased when a formulation changes, so that old measurements are ignored
MOST_TOKENS = {  # for which a formulation is the default
    INT4PACK.name: 24,
    INT8PACK.name: 24,
    DEFINITION.name: 24,  # above, products in 16 bits outweigh its single loop over W
}
AS_USUAL = "default"  # stored in place of a formulation's name where the default stays
Crossovers = list[tuple[int, str]]  # (the most tokens, the formulation), ascending

_UNREAD = "not looked for yet"
_tables: dict[Hashable, Crossovers | None] = {}
_lock = threading.Lock()


def choose(
    weight: PreparedWeight,
    dtype: torch.dtype,
    tokens: int,
    slices: Sequence[PreparedSlice] = (),
) -> Formulation:
    """Return the formulation of a layer: the measured one, or the default.

    Within another ``torch.compile`` it is a default that needs no backend of its own.

    Args:
        weight: returned by ``prepare``.
        dtype: the dtype of x.
        tokens: rows of x.
        slices: the adapters, by slice of the outputs.
    """
    if torch.compiler.is_compiling():
        return default(weight, dtype, tokens, slices, inlined=True)
    for most, name in kept_crossovers(weight, dtype, slices) or ():
        if tokens <= most:
            usual = name == AS_USUAL
            return default(weight, dtype, tokens, slices) if usual else FORMULATIONS[name]
    return default(weight, dtype, tokens, slices)


def default(
    weight: PreparedWeight,
    dtype: torch.dtype,
    tokens: int,
    slices: Sequence[PreparedSlice] = (),
    *,
    inlined: bool = False,
) -> Formulation:
    """Return the formulation of a layer where nothing was measured.

    Args:
        weight: returned by ``prepare``.
        dtype: the dtype of x.
        tokens: rows of x.
        slices: the adapters, by slice of the outputs.
        inlined: whether the layer becomes part of another graph.
    """
    for one in (INT4PACK, INT8PACK, SPLIT_K, MAGIC_GEMV, GEMV, DEFINITION):
        many = one.name in MOST_TOKENS and tokens > MOST_TOKENS[one.name]
        needs_options = inlined and one.backend is not None
        if not many and not needs_options and one.takes(weight, dtype, tokens, slices):
            return one
    return TILES


def candidates(
    weight: PreparedWeight,
    dtype: torch.dtype,
    tokens: int,
    slices: Sequence[PreparedSlice] = (),
) -> list[Formulation]:
    """Return every formulation that is meant for the weight's device and takes the operands."""
    return [one for one in FORMULATIONS.values() if one.takes(weight, dtype, tokens, slices)]


def kept_crossovers(
    weight: PreparedWeight, dtype: torch.dtype, slices: Sequence[PreparedSlice] = ()
) -> Crossovers | None:
    """Return the crossovers stored for a kind of layer on this machine, or None.

    Adapters are of one kind if they have the same ranks and write the same outputs: their number
    and their dtype hardly change which formulation is fastest.

    Each process reads the disk once for each kind of layer.
    """
    kind = _kind(weight, dtype, slices)
    crossovers = _tables.get(kind, _UNREAD)
    if isinstance(crossovers, str):
        with _lock:
            crossovers = _checked(recall(CACHE, _on_disk(kind)), weight, dtype, slices)
            _tables[kind] = crossovers
    return crossovers


def keep_crossovers(
    weight: PreparedWeight,
    dtype: torch.dtype,
    slices: Sequence[PreparedSlice],
    crossovers: Crossovers,
) -> bool:
    """Store the crossovers of a kind of layer, for this process and on disk.

    Returns:
        Whether they could be written to disk.
    """
    kind = _kind(weight, dtype, slices)
    with _lock:
        _tables[kind] = crossovers
        return remember(CACHE, _on_disk(kind), crossovers)


class _Kind(NamedTuple):
    """The properties of a layer that decide which formulation is fastest."""

    weight: tuple[object, ...]
    x: torch.dtype
    adapters: tuple[tuple[int, int, int], ...]  # rank, start and stop of each slice
    threads: int
    device: torch.device


def _kind(weight: PreparedWeight, dtype: torch.dtype, slices: Sequence[PreparedSlice]) -> _Kind:
    device = weight.device
    return _Kind(
        weight.signature,
        dtype,
        tuple([(part.rank, part.start, part.stop) for part in slices]),
        torch.get_num_threads() if device.type == "cpu" else 0,
        device,
    )


def _on_disk(kind: _Kind) -> dict[str, Any]:
    """Return the key of a kind in the disk cache."""
    layout, *fields = kind.weight
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "device": device_name(kind.device),
        "threads": kind.threads,
        "weight": [getattr(layout, "__name__", ""), *map(_plain, fields)],
        "x": str(kind.x),
        "adapters": [list(adapter) for adapter in kind.adapters],
    }


def _checked(
    kept: Any, weight: PreparedWeight, dtype: torch.dtype, slices: Sequence[PreparedSlice]
) -> Crossovers | None:
    """Return stored crossovers if every formulation takes the tokens it is stored for."""
    found: Crossovers = []
    first = 1
    for entry in kept if isinstance(kept, list) else ():
        if not isinstance(entry, list) or [type(part) for part in entry] != [int, str]:
            return None
        most, name = entry
        ends = (first, most)
        known = name == AS_USUAL or all(takes(name, weight, dtype, one, slices) for one in ends)
        if most < first or not known:
            return None
        found.append((most, name))
        first = most + 1
    return found or None


def takes(
    name: str,
    weight: PreparedWeight,
    dtype: torch.dtype,
    tokens: int,
    slices: Sequence[PreparedSlice] = (),
) -> bool:
    """Return whether a formulation has that name and is a candidate."""
    return name in FORMULATIONS and FORMULATIONS[name].takes(weight, dtype, tokens, slices)


def _plain(value: object) -> Any:
    """Return a part of a signature in JSON's types, without devices: the key names the device."""
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value if not isinstance(part, torch.device)]
    return value if isinstance(value, (int, str, type(None))) else str(value)


@functools.cache
def device_name(device: torch.device) -> str:
    """Return the name under which measurements on a device are stored."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    lines = Path("/proc/cpuinfo")
    text = lines.read_text(encoding="utf-8") if lines.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
