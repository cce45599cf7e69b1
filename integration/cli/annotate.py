"""The command ``int4-lora annotate``.

Source: ``docs/commands/annotate.md``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int4_lora.integration.cli.console import refusing_bad_input
from int4_lora.integration.cli.options import Unlisted, choice_of

if TYPE_CHECKING:
    from int4_lora.integration.annotation.write import Annotation

__all__ = ["annotate"]


def annotate(
    path: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="The folder of a compressed-tensors checkpoint."),
    ],
    unlisted: Unlisted = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Write into a checkpoint which modules take adapters.

    Sets lora_compatible, lora_target_modules and suggested_lora_targets in config.json, keeps
    every other value in it, and writes lora_metadata.json, which also says how each weight is
    packed.

    Example: int4-lora annotate ./llama-w4a16
    """
    with refusing_bad_input():
        from int4_lora.integration.annotation import write

        act = write.preview_annotation if dry_run else write.annotate
        annotation = act(path, unlisted=choice_of(unlisted))
    if as_json:
        plain = {**dataclasses.asdict(annotation), "path": str(path), "dry_run": dry_run}
        typer.echo(json.dumps(plain, indent=2))
    else:
        _print(annotation, dry_run)


def _print(annotation: Annotation, dry_run: bool) -> None:
    typer.echo(f"lora_compatible: {'true' if annotation.lora_compatible else 'false'}")
    for reason in annotation.incompatible_because:
        typer.echo(f"  {reason}")
    for name in ("lora_target_modules", "suggested_lora_targets"):
        typer.echo(f"{name}: {', '.join(getattr(annotation, name)) or 'none'}")
    typer.echo(f"{annotation.modules} modules described")
    files = ", ".join(annotation.changed) or "nothing"
    typer.echo(f"{'would write' if dry_run else 'wrote'}: {files}")
