"""Convert AWQ and GPTQ checkpoints to pack-quantized, without changing a weight.

Codes, zero-points, scales and g_idx keep their values; only their places change.

Source: ``docs/commands/convert.md``.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from int4_lora.integration.checkpoint.open import FLOATS, Checkpoint, Unlisted, open_checkpoint
from int4_lora.integration.checkpoint.quantization_config import (
    CONFIG_KEYS,
    METHOD,
    method_of,
    parts_of,
)
from int4_lora.integration.checkpoint.scheme import PACKED_FORMAT, Scheme
from int4_lora.integration.conversion.accounting import check_accounted
from int4_lora.integration.conversion.convert import Conversion, Outcome, Settings, convert
from int4_lora.integration.conversion.repacked_modules import RepackedModule
from int4_lora.integration.conversion.tasks import Copy
from int4_lora.integration.conversion.unpack import check_all_is_read, tasks_in_order

__all__ = ["convert_checkpoint", "modules_with_g_idx", "plan_convert", "quantization_of"]

HEADS = ("lm_head", "embed_out")


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str = PACKED_FORMAT,
    unlisted: Unlisted | None = None,
    settings: Settings | None = None,
) -> Outcome:
    """Write the compressed-tensors checkpoint with the weights of an AWQ or GPTQ checkpoint.

    Args:
        source: a checkpoint's folder, or its name on the hub.
        target: the folder to write.
        to: the format of the result: "pack-quantized".
        unlisted: what to do with unlisted tensors, as in ``open_checkpoint``.
        settings: how to run the conversion.

    Returns:
        What was written.

    Raises:
        OSError: the source does not exist, or the target cannot be written.
        TypeError: a tensor has the wrong dtype.
        ValueError: the source is of compressed-tensors already, a module cannot be converted
            without changing its weight, or tensors are unlisted; the message names them.

    Example:
        >>> convert_checkpoint("llama-awq", "llama-w4a16")  # doctest: +SKIP
    """
    plan = plan_convert(open_checkpoint(source, unlisted=unlisted), to)
    return convert(plan, Path(target), settings or Settings())


def plan_convert(checkpoint: Checkpoint, to: str = PACKED_FORMAT) -> Conversion:
    """Return the plan of ``convert_checkpoint``, after checking every header and zero-point."""
    if to != PACKED_FORMAT:
        raise ValueError(f"to must be {PACKED_FORMAT!r}, got {to!r}")
    method = method_of(checkpoint.quantization)
    if method == METHOD:
        raise ValueError(f"{checkpoint.path}: quant_method is {METHOD!r} already")
    checkpoint.check_listed()
    check_all_is_read(checkpoint)
    ordered = modules_with_g_idx(checkpoint)
    tasks = tasks_in_order(
        checkpoint.tensors,
        {full: name for name in checkpoint.modules() for full in checkpoint.stored(name)},
        lambda name: RepackedModule(checkpoint, name, g_idx=name in ordered),
        lambda name, stored: Copy(name, stored),
    )
    check_accounted(checkpoint.path, checkpoint.tensors, tasks, {})
    return Conversion(
        checkpoint.path,
        (),
        tasks,
        _config(checkpoint, ordered),
        notes=(*checkpoint.left_behind, *_notes(ordered)),
        reads={stored.file.name for stored in checkpoint.tensors.values()},
    )


def modules_with_g_idx(checkpoint: Checkpoint) -> set[str]:
    """Check every module, and return those that get a ``weight_g_idx``.

    The modules of one config group get it if one of them needs it: actorder is the group's.

    Args:
        checkpoint: an open checkpoint of AWQ or GPTQ.
    """
    needing = {
        checkpoint.schemes[name]
        for name in checkpoint.modules()
        if checkpoint.check_values(name).g_idx is not None
    }
    return {name for name in checkpoint.modules() if checkpoint.schemes[name] in needing}


def _notes(ordered: set[str]) -> list[str]:
    if not ordered:
        return []
    return [
        f"{len(ordered)} modules have a weight_g_idx: vLLM 0.30 and later without --quantization "
        "int4_lora, and compressed-tensors 0.19 and later, do not load them"
    ]


def _config(checkpoint: Checkpoint, ordered: set[str]) -> dict[str, Any]:
    """Return config.json with compressed-tensors' ``quantization_config`` in each place."""
    config = copy.deepcopy(dict(checkpoint.config))
    quantization = quantization_of(checkpoint, ordered)
    for _, part in list(parts_of(config)):
        for key in CONFIG_KEYS:
            if part.get(key) is not None:
                part[key] = copy.deepcopy(quantization)
    return config


def quantization_of(checkpoint: Checkpoint, ordered: set[str]) -> dict[str, Any]:
    """Return a ``quantization_config`` of one group for each scheme, the most frequent first.

    The first group targets all linear layers that the others and ``ignore`` do not name.

    Args:
        checkpoint: an open checkpoint of AWQ or GPTQ.
        ordered: returned by ``modules_with_g_idx``.
    """
    counts = Counter(checkpoint.schemes.values())
    groups = {}
    for number, (scheme, _) in enumerate(counts.most_common()):
        names = [name for name in checkpoint.modules() if checkpoint.schemes[name] == scheme]
        targets = names if number else ["Linear"]
        groups[f"group_{number}"] = _group(scheme, targets, g_idx=names[0] in ordered)
    return {
        "quant_method": METHOD,
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _ignored(checkpoint),
        "kv_cache_scheme": None,
    }


def _group(scheme: Scheme, targets: Sequence[str], *, g_idx: bool) -> dict[str, Any]:
    weights: Mapping[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "actorder": "group" if g_idx else None,
        "dynamic": False,
    }
    return {
        "targets": list(targets),
        "weights": dict(weights),
        "input_activations": None,
        "output_activations": None,
        "format": PACKED_FORMAT,
    }


def _ignored(checkpoint: Checkpoint) -> list[str]:
    """Return the modules whose weight is a float matrix, and the head, unless it is quantised."""
    matrices = [
        name.removesuffix(".weight")
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2 and stored.dtype in FLOATS
    ]
    known = {name.rpartition(".")[2] for name in (*checkpoint.schemes, *matrices)}
    return [*matrices, *([] if known & {*HEADS} else HEADS[:1])]  # a tied head is not stored
