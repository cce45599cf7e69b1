"""The command ``int4-lora merge``.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from int4_lora.integration.cli.console import refusing_bad_input
from int4_lora.integration.cli.conversion import (
    DryRun,
    Force,
    Jobs,
    MaxShardSize,
    Share,
    Target,
    as_settings,
    run,
)
from int4_lora.integration.cli.options import (
    AsJson,
    CheckpointPath,
    Dtype,
    RenameOption,
    Unlisted,
    as_rename,
    as_torch,
    choice_of,
)
from int4_lora.integration.conversion.merge_report import MOST_ERROR

__all__ = ["merge"]


class _To(str, Enum):
    DENSE = "dense"
    INT4 = "int4"
    INT8 = "int8"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"


class _Scales(str, Enum):
    SEARCH = "search"
    MINMAX = "minmax"


def merge(
    source: CheckpointPath,
    target: Target,
    adapter: Annotated[
        list[str],
        typer.Option(
            metavar="PATH[=WEIGHT]",
            help="A PEFT adapter and its weight, 1 by default; may be repeated.",
        ),
    ],
    rename: RenameOption = None,
    to: Annotated[_To, typer.Option(help="What the merged weights become.")] = _To.DENSE,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="The dtype of a dense result; by default that of the scales."),
    ] = None,
    scales: Annotated[
        _Scales, typer.Option(help="How the scales of a quantised result are chosen.")
    ] = _Scales.SEARCH,
    max_error: Annotated[
        float, typer.Option(help="The largest relative error that a quantised module may have.")
    ] = MOST_ERROR,
    unlisted: Unlisted = None,
    jobs: Jobs = None,
    share: Share = None,
    max_shard_size: MaxShardSize = 5.0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint with adapters merged in, dense or quantised.

    A quantised result is quantised again in the format of each module: the relative error that this
    adds to each module's weight is printed. A killed run continues when the same command is run
    again. Exit code 1 if a module's error exceeds --max-error, 2 if the input cannot be used; in
    both cases DST is not written.

    Example: int4-lora merge ./llama-w4a16 ./merged --adapter ./sql=0.7 --to int4
    """
    with refusing_bad_input():
        adapters = [_path_and_weight(option) for option in adapter]
        rules = as_rename(rename)
        settings = as_settings(jobs, share, max_shard_size, force=force, dry_run=dry_run)
        from int4_lora.integration.adapter.read import read_adapter
        from int4_lora.integration.checkpoint.open import open_checkpoint
        from int4_lora.integration.conversion.merge import plan_merge

        plan = plan_merge(
            open_checkpoint(source, unlisted=choice_of(unlisted)),
            [(read_adapter(path), weight) for path, weight in adapters],
            to=to.value,
            dtype=as_torch(dtype),
            search=scales is _Scales.SEARCH,
            max_error=max_error,
            rename=rules,
        )
    run(plan, target, settings, as_json=as_json)


def _path_and_weight(option: str) -> tuple[str, float]:
    """Return the path and the weight of ``PATH[=WEIGHT]``; the path may contain ``=``."""
    path, equals, text = option.rpartition("=")
    if not equals or Path(option).is_dir():
        return option, 1.0
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"--adapter must be PATH or PATH=WEIGHT, got {option!r}") from None
    if not math.isfinite(weight):
        raise ValueError(f"--adapter must have a finite weight, got {option!r}")
    return path, weight
