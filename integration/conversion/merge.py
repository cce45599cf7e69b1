"""A checkpoint with adapters merged into its weights, dense or quantised again.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from int4_lora.integration.adapter.read import Adapter, read_adapter
from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.integration.conversion.convert import Conversion, Outcome, Settings, convert
from int4_lora.integration.conversion.deltas import Delta, deltas_of
from int4_lora.integration.conversion.dense_config import dense_config
from int4_lora.integration.conversion.merge_report import REPORT, Acceptance
from int4_lora.integration.conversion.requantized_modules import MADE_ANEW, RequantizedModule
from int4_lora.integration.conversion.row_blocks import check_packed
from int4_lora.integration.conversion.tasks import Task
from int4_lora.integration.conversion.unpack import check_dense_dtype, dense_tasks, plain_task

__all__ = ["MOST_ERROR", "To", "merge_checkpoint", "plan_merge"]

MOST_ERROR = 0.2  # of a module, relative: twice what quantising a normal weight in groups costs
To = Literal["dense", "int4"]


def merge_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    adapters: Sequence[tuple[str | os.PathLike[str], float]],
    *,
    to: To = "dense",
    dtype: torch.dtype | None = None,
    search: bool = True,
    max_error: float = MOST_ERROR,
    settings: Settings | None = None,
) -> Outcome:
    """Write a checkpoint whose weights are W + sum of weight * scaling * B A.

    Args:
        source: an INT4 checkpoint's folder, or its name on the hub.
        target: the folder to make.
        adapters: folders of adapters, and what each is multiplied by.
        to: "dense", rounded once; or "int4", where the modules that an adapter changes are
            quantised again in their groups and all other tensors stay as they are.
        dtype: of a dense result, as in ``unpack_checkpoint``.
        search: whether scales are searched for, or min-max.
        max_error: the largest relative error of a module that is accepted.
        settings: how it is run.

    Returns:
        What was done, and for "int4" what it cost.

    Raises:
        ImportError: compressed-tensors is not installed.
        MergeRefusedError: a module's error is larger than ``max_error``.
        OSError: a source is not there, or the target cannot be written.
        TypeError: a tensor of the wrong dtype.
        ValueError: adapters that do not fit the base, a merged weight that is not finite in its
            dtype, or options that contradict each other.

    Example:
        >>> merge_checkpoint("llama-w4a16", "merged", [("adapter", 1.0)])  # doctest: +SKIP

    Source:
        ``docs/commands/merge.md``.
    """
    opened = [(read_adapter(path), weight) for path, weight in adapters]
    plan = plan_merge(
        open_checkpoint(source), opened, to=to, dtype=dtype, search=search, max_error=max_error
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
) -> Conversion:
    """Return what ``merge_checkpoint`` does; headers and adapters are read and checked."""
    if not adapters:
        raise ValueError("merge needs at least one adapter")
    if to not in ("dense", "int4"):
        raise ValueError(f"to must be 'dense' or 'int4', got {to!r}")
    for adapter, weight in adapters:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"{adapter.path}: its weight must be a finite number, got {weight!r}")
    check_dense_dtype(dtype)
    if to == "int4" and dtype is not None:
        raise ValueError("dtype is of a dense result; merged INT4 keeps the dtypes of the source")
    deltas = deltas_of(checkpoint, adapters)
    others = tuple(adapter.path for adapter, _ in adapters)
    if to == "dense":
        tasks = dense_tasks(checkpoint, dtype, deltas)
        config = dense_config(checkpoint.config, dtype)
        return Conversion(checkpoint.path, others, tuple(tasks), config)
    tasks = _int4_tasks(checkpoint, deltas, search=search)
    said = {
        "adapters": [{"name": one.path.name, "weight": weight} for one, weight in adapters],
        "scales": "search" if search else "minmax",
    }
    accept = Acceptance(max_error, said)
    return Conversion(checkpoint.path, others, tuple(tasks), None, accept=accept, report=REPORT)


def _int4_tasks(
    checkpoint: Checkpoint, deltas: Mapping[str, Sequence[Delta]], *, search: bool
) -> list[Task]:
    """Return what makes every tensor of a merged INT4 checkpoint, in the order of the source."""
    changed = [one for one in checkpoint.modules() if one in deltas]
    for one in changed:
        check_packed(checkpoint, one)
    made = {f"{one}.{part}": one for one in changed for part in MADE_ANEW}
    tasks: list[Task] = []
    begun: set[str] = set()
    for full, stored in checkpoint.tensors.items():
        name = made.get(full)
        if name is None:
            tasks.append(plain_task(full, stored, None, deltas))
        elif name not in begun:
            begun.add(name)
            tasks.append(RequantizedModule(checkpoint, name, deltas[name], search=search))
    return tasks
