"""``int4-lora annotate``.

Source: ``docs/commands/annotate.md``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from int4_lora.integration.annotation.write import Annotation, preview_annotation
from int4_lora.integration.annotation.write import annotate as annotate_checkpoint
from int4_lora.integration.cli.exits import unusable

__all__ = ["annotate"]


def annotate(
    path: Annotated[Path, typer.Argument(help="The folder of a compressed-tensors checkpoint.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not lines.")] = False,
) -> None:
    """Write into a checkpoint which modules take adapters, and how each weight is packed.

    Sets lora_compatible, lora_target_modules and suggested_lora_targets in config.json and writes
    lora_metadata.json; nothing else changes.

    Example: int4-lora annotate ./llama-w4a16
    """
    try:
        found = preview_annotation(path) if dry_run else annotate_checkpoint(path)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    if as_json:
        plain = {**dataclasses.asdict(found), "path": str(found.path), "dry_run": dry_run}
        typer.echo(json.dumps(plain, indent=2))
    else:
        _print(found, dry_run)


def _print(found: Annotation, dry_run: bool) -> None:
    typer.echo(f"lora_compatible: {'true' if found.lora_compatible else 'false'}")
    for reason in found.incompatible_because:
        typer.echo(f"  {reason}")
    for name in ("lora_target_modules", "suggested_lora_targets"):
        typer.echo(f"{name}: {', '.join(getattr(found, name)) or 'nothing'}")
    typer.echo(f"{found.modules} modules described")
    written = ", ".join(found.changed) or "nothing"
    typer.echo(f"{'would write' if dry_run else 'wrote'}: {written}")
