"""The command ``int4-lora unpack``.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

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
    Unlisted,
    as_torch,
    choice_of,
)

__all__ = ["unpack"]


def unpack(
    source: CheckpointPath,
    target: Target,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="The dtype of the dense weights; by default that of the scales."),
    ] = None,
    unlisted: Unlisted = None,
    jobs: Jobs = None,
    share: Share = None,
    max_shard_size: MaxShardSize = 5.0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write the dense checkpoint of a quantised one.

    The weights are exactly those that the quantised checkpoint encodes. A killed run continues when
    the same command is run again. Exit code 2 if CHECKPOINT or DST cannot be used; then DST is not
    written.

    Example: int4-lora unpack ./llama-w4a16 ./llama-dense
    """
    with refusing_bad_input():
        settings = as_settings(jobs, share, max_shard_size, force=force, dry_run=dry_run)
        from int4_lora.integration.checkpoint.open import open_checkpoint
        from int4_lora.integration.conversion.unpack import plan_unpack

        plan = plan_unpack(open_checkpoint(source, unlisted=choice_of(unlisted)), as_torch(dtype))
    run(plan, target, settings, as_json=as_json)
