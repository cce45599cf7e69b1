"""Merge adapters into the weights of a checkpoint; the result is dense or quantised again.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.adapter.experts import check_all_experts
from int4_lora.integration.adapter.fitting import check_used, fit_adapter
from int4_lora.integration.adapter.read import read_adapter
from int4_lora.integration.checkpoint.open import Checkpoint, Unlisted, open_checkpoint
from int4_lora.integration.conversion.accounting import check_accounted
from int4_lora.integration.conversion.changes import Changes, changes_of
from int4_lora.integration.conversion.convert import Conversion, Outcome, Settings, convert
from int4_lora.integration.conversion.merge_report import MOST_ERROR, REPORT, accepted_report
from int4_lora.integration.conversion.requantized_float4 import RequantizedFloat4Module
from int4_lora.integration.conversion.requantized_modules import (
    RequantizedModule,
    replaced_tensors,
)
from int4_lora.integration.conversion.row_blocks import check_packed
from int4_lora.integration.conversion.saved_copies import without_copies
from int4_lora.integration.conversion.unpack import plan_dense, tasks_in_order

__all__ = ["To", "merge_checkpoint", "plan_merge"]

To = Literal["dense", "int4", "int8", "nvfp4", "mxfp4"]


def merge_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    *,
    to: To = "dense",
    dtype: torch.dtype | None = None,
    search: bool = True,
    max_error: float = MOST_ERROR,
    rename: Sequence[tuple[str, str]] = (),
    unlisted: Unlisted | None = None,
    settings: Settings | None = None,
) -> Outcome:
    """Write a checkpoint whose weights are W + sum of weight * scaling * B A.

    Args:
        source: a quantised checkpoint's folder, or its name on the hub.
        target: the folder to write.
        adapters: the folders of adapters, and the factor of each.
        to: "dense" rounds the sum once; the name of a format requantises each module that an
            adapter changes, in its own format and groups, and copies the tensors that no adapter
            changes. At least one of these modules must be of the format that is named.
        dtype: the dtype of a dense result, as in ``unpack_checkpoint``.
        search: whether to search for scales, or to use min-max scales.
        max_error: the largest relative error of a requantised module that is accepted.
        rename: how modules of the adapters are renamed, as in ``fit_adapter``.
        unlisted: what to do with unlisted tensors of the source, as in ``open_checkpoint``.
        settings: how to run the conversion.

    Returns:
        What was written, and unless it is dense the report of the requantisation error.

    Raises:
        ImportError: a module needs compressed-tensors, and it is not installed.
        MergeRefusedError: the error of a module is larger than ``max_error``.
        OSError: a source does not exist, or the target cannot be written.
        TypeError: a tensor has the wrong dtype.
        ValueError: an adapter does not fit the base, a merged weight is not finite in its dtype,
            tensors are unlisted, or options contradict each other.

    Example:
        >>> merge_checkpoint("llama-w4a16", "merged", [("adapter", 1.0)])  # doctest: +SKIP
    """
    opened = [(read_adapter(path), weight) for path, weight in adapters]
    plan = plan_merge(
        open_checkpoint(source, unlisted=unlisted),
        opened,
        to=to,
        dtype=dtype,
        search=search,
        max_error=max_error,
        rename=rename,
    )
    return convert(plan, Path(target), settings or Settings())


def plan_merge(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    to: To = "dense",
    dtype: torch.dtype | None = None,
    search: bool = True,
    max_error: float = MOST_ERROR,
    rename: Sequence[tuple[str, str]] = (),
) -> Conversion:
    """Return the plan of ``merge_checkpoint``, after checking the adapters and every header."""
    if not adapters:
        raise ValueError("merge needs at least one adapter")
    if to not in get_args(To):
        raise ValueError(f"to must be one of {', '.join(map(repr, get_args(To)))}, got {to!r}")
    for adapter, weight in adapters:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{adapter.path}: its weight must be a finite number, got {weight!r}")
    checkpoint.check_listed()  # before an adapter looks for the unlisted tensors
    check_used(rename, [adapter for adapter, _ in adapters])
    fitted = [
        (without_copies(fit_adapter(adapter, checkpoint, rename), checkpoint), weight)
        for adapter, weight in adapters
    ]
    for adapter, _ in fitted:
        check_all_experts(adapter, checkpoint)
    changes = changes_of(checkpoint, fitted)
    if to == "dense":
        folders = tuple(adapter.path for adapter, _ in fitted)
        plan = plan_dense(checkpoint, dtype, changes, folders)
    elif dtype is not None:
        raise ValueError(
            "dtype is of a dense result; a merged quantised result keeps the dtypes of the source"
        )
    else:
        plan = _plan_quantised(checkpoint, fitted, changes, to, search=search, max_error=max_error)
    notes = [
        f"{adapter.path}: {note}"
        for adapter, _ in fitted
        for note in (*adapter.notes, *_replaced(adapter))
    ]
    return replace(plan, notes=(*checkpoint.left_behind, *notes, *changes.notes))


def _format(checkpoint: Checkpoint, name: str) -> str:
    """Return the format of a module as ``to`` names it, or that of its scheme."""
    scheme = checkpoint.schemes[name]
    if checkpoint.is_packed(name):
        return f"int{scheme.bits}"
    return scheme.format.partition("-")[0] if checkpoint.is_float4(name) else scheme.format


def _requantized(
    checkpoint: Checkpoint, name: str, changes: Changes, *, search: bool
) -> RequantizedModule:
    kind = RequantizedFloat4Module if checkpoint.is_float4(name) else RequantizedModule
    return kind(checkpoint, name, changes.modules[name], search=search)


def _replaced(adapter: Adapter) -> list[str]:
    """Return one sentence for each tensor of the base that an adapter replaces."""
    return [replacement.describe(name) for name, replacement in adapter.replacements.items()]


def _reported(adapter: Adapter, weight: float) -> dict[str, object]:
    """Return what the report says of an adapter."""
    replaced = [
        {"tensor": name, "rows": None if replacement.rows is None else replacement.rows.tolist()}
        for name, replacement in adapter.replacements.items()
    ]
    return {"name": adapter.path.name, "weight": weight, "replaced": replaced}


def _plan_quantised(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    changes: Changes,
    to: To,
    *,
    search: bool,
    max_error: float,
) -> Conversion:
    if not max_error >= 0:
        raise ValueError(f"max_error must be 0 or more, got {max_error}")
    checkpoint.check_compressed_tensors(f"merging into {to.upper()}")
    changed = [name for name in checkpoint.modules() if name in changes.modules]
    formats = {_format(checkpoint, name) for name in changed}
    if formats and to not in formats:
        raise ValueError(
            f"{checkpoint.path}: the modules that the adapters change are "
            f"{' and '.join(sorted(formats))}, and stay so: to cannot be {to!r}"
        )
    for name in changed:
        if not checkpoint.is_packed(name) and not checkpoint.is_float4(name):
            raise ValueError(
                f"{checkpoint.path}: {name}: it is {checkpoint.schemes[name].format}, into which "
                "adapters are not merged: the result can be dense alone"
            )
        check_packed(checkpoint, name)
    tasks = tasks_in_order(
        checkpoint.tensors,
        {full: name for name in changed for full in replaced_tensors(checkpoint, name)},
        lambda name: _requantized(checkpoint, name, changes, search=search),
        lambda name, stored: changes.plain_task(name, stored, None),
    )
    tasks += changes.added_tasks(checkpoint, None)
    check_accounted(checkpoint.path, checkpoint.tensors, tasks, {})
    settings = {
        "adapters": [_reported(adapter, weight) for adapter, weight in adapters],
        "scales": "search" if search else "minmax",
    }
    return Conversion(
        source=checkpoint.path,
        others=tuple(adapter.path for adapter, _ in adapters),
        tasks=tasks,
        config=changes.config(checkpoint.config) if changes.unties else None,
        accept=functools.partial(accepted_report, settings=settings, max_error=max_error),
        report=REPORT,
        reads={stored.file.name for stored in checkpoint.tensors.values()},
    )
