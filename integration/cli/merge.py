"""``int4-lora merge``.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from int4_lora.integration.adapter.read import read_adapter
from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.cli.exits import unusable
from int4_lora.integration.cli.options import (
    DryRun,
    Force,
    Jobs,
    MaxShardSize,
    Share,
    dtype_of,
    run,
    settings_of,
)
from int4_lora.integration.conversion.merge import MOST_ERROR, plan_merge

__all__ = ["merge"]


class _To(str, Enum):
    DENSE = "dense"
    INT4 = "int4"


class _Scales(str, Enum):
    SEARCH = "search"
    MINMAX = "minmax"


def merge(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A compressed-tensors checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    adapter: Annotated[
        list[str],
        typer.Option(metavar="PATH[=WEIGHT]", help="An adapter; may be given several times."),
    ],
    to: Annotated[_To, typer.Option(help="What the merged weights become.")] = _To.DENSE,
    dtype: Annotated[
        str | None, typer.Option(help="Of a dense result: float16, bfloat16 or float32.")
    ] = None,
    scales: Annotated[
        _Scales, typer.Option(help="Of an INT4 result: searched for, or min-max.")
    ] = _Scales.SEARCH,
    max_error: Annotated[
        float, typer.Option(help="The largest relative error of a module that is accepted.")
    ] = MOST_ERROR,
    jobs: Jobs = None,
    share: Share = None,
    max_shard_size: MaxShardSize = 5.0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Merge adapters into the weights, dense or quantised again.

    Quantised again, it says what each module lost against the exact sum. Exit code 1 if one lost
    more than --max-error, 2 if the input cannot be used; nothing stands at DST then.

    Example: int4-lora merge ./llama-w4a16 ./merged --adapter ./sql=0.7 --to int4
    """
    settings = settings_of(jobs, share, max_shard_size, force=force, dry_run=dry_run)
    try:
        adapters = [_adapter_and_weight(one) for one in adapter]
        plan = plan_merge(
            open_checkpoint(source),
            [(read_adapter(path), weight) for path, weight in adapters],
            to=to.value,
            dtype=dtype_of(dtype),
            search=scales is _Scales.SEARCH,
            max_error=max_error,
        )
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    run(plan, target, settings, as_json=as_json)


def _adapter_and_weight(given: str) -> tuple[str, float]:
    """Return the path and the weight of ``PATH[=WEIGHT]``; a path may hold a ``=``, too."""
    path, equals, text = given.rpartition("=")
    if not equals or Path(given).is_dir():
        return given, 1.0
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"--adapter must be PATH or PATH=WEIGHT, got {given!r}") from None
    if not math.isfinite(weight):
        raise ValueError(f"--adapter must have a finite weight, got {given!r}")
    return path, weight
