"""``int4-lora unpack``.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from int4_lora.integration.conversion.unpack import plan_unpack

__all__ = ["unpack"]


def unpack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A compressed-tensors checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="float16, bfloat16 or float32; as it is stored by default.")
    ] = None,
    jobs: Jobs = None,
    share: Share = None,
    max_shard_size: MaxShardSize = 5.0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Write a dense checkpoint, bit for bit what the quantised one stands for.

    What was killed goes on where it was when it is called again. Exit code 2 if the source or the
    target cannot be used; nothing stands at DST then.

    Example: int4-lora unpack ./llama-w4a16 ./llama-dense
    """
    settings = settings_of(jobs, share, max_shard_size, force=force, dry_run=dry_run)
    try:
        plan = plan_unpack(open_checkpoint(source), dtype_of(dtype))
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    run(plan, target, settings, as_json=as_json)
