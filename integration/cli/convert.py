"""The command ``int4-lora convert``.

Source: ``docs/commands/convert.md``.
"""

from __future__ import annotations

from enum import Enum
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
from int4_lora.integration.cli.options import AsJson, CheckpointPath, Unlisted, choice_of

__all__ = ["convert"]


class _To(str, Enum):
    PACK_QUANTIZED = "pack-quantized"


def convert(
    source: CheckpointPath,
    target: Target,
    to: Annotated[_To, typer.Option(help="The format of the result.")] = _To.PACK_QUANTIZED,
    unlisted: Unlisted = None,
    jobs: Jobs = None,
    share: Share = None,
    max_shard_size: MaxShardSize = 5.0,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write the compressed-tensors checkpoint of an AWQ or GPTQ one.

    No weight changes; a module that cannot be converted so is refused. A killed run continues when
    the same command is run again. Exit code 2 if CHECKPOINT or DST cannot be used; then DST is not
    written.

    Example: int4-lora convert ./llama-awq ./llama-w4a16
    """
    with refusing_bad_input():
        settings = as_settings(jobs, share, max_shard_size, force=force, dry_run=dry_run)
        from int4_lora.integration.checkpoint.open import open_checkpoint
        from int4_lora.integration.conversion.repack import plan_convert

        plan = plan_convert(open_checkpoint(source, unlisted=choice_of(unlisted)), to.value)
    run(plan, target, settings, as_json=as_json)
