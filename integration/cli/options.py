"""What the commands that write checkpoints have in common: options, progress, what they print.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from int4_lora.integration.cli.console import wide_console
from int4_lora.integration.cli.exits import unusable
from int4_lora.integration.conversion.convert import Conversion, Outcome, Settings, convert
from int4_lora.integration.conversion.merge_report import MergeRefusedError
from int4_lora.integration.conversion.unpack import DENSE_DTYPES

__all__ = ["DryRun", "Force", "Jobs", "MaxShardSize", "Share", "dtype_of", "run", "settings_of"]

MOST_JOBS = 64
Jobs = Annotated[int | None, typer.Option(help="Tensors worked on at a time (processors, 4).")]
Share = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Write the I-th of N shares of the files only."),
]
MaxShardSize = Annotated[float, typer.Option(help="GB of tensors in a file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at DST.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
]


def settings_of(
    jobs: int | None, share: str | None, max_shard_size: float, *, force: bool, dry_run: bool
) -> Settings:
    """Return the options as settings, or end the command over a wrong one."""
    if jobs is None:
        jobs = min(4, os.cpu_count() or 1)
    if not 1 <= jobs <= MOST_JOBS:
        raise unusable(f"--jobs must be in [1, {MOST_JOBS}], got {jobs}")
    if not 1e-6 <= max_shard_size <= 1e6:
        raise unusable(f"--max-shard-size must be in [1e-6, 1e6] GB, got {max_shard_size:g}")
    number = None
    if share is not None:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", share)
        number = (int(match[1]), int(match[2])) if match else None
        if number is None or not 1 <= number[0] <= number[1]:
            raise unusable(f"--shard must be I/N with I in 1 to N, got {share!r}")
    most = int(max_shard_size * 1e9)
    return Settings(jobs, number, most_bytes=most, force=force, dry_run=dry_run)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name, or None.

    Raises:
        ValueError: no dtype that a dense checkpoint may have.
    """
    if name is None:
        return None
    if name not in DENSE_DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DENSE_DTYPES)}, got {name!r}")
    return DENSE_DTYPES[name]


def run(plan: Conversion, target: Path, settings: Settings, *, as_json: bool) -> None:
    """Run a conversion with a progress bar and say what came out; end the command if it failed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    try:
        with Progress(
            *columns, console=console, transient=True, disable=as_json or not console.is_terminal
        ) as progress:
            bar = progress.add_task("writing", total=None)
            told = dataclasses.replace(
                settings,
                advance=lambda count: progress.advance(bar, count),
                begin=lambda total: progress.update(bar, total=total),
            )
            outcome = convert(plan, target, told)
    except MergeRefusedError as error:
        if as_json:
            typer.echo(json.dumps({"finished": False, "report": error.report}, indent=2))
        typer.secho(f"int4-lora: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; with more room, the same command goes on where it was" if full else ""
        raise unusable(f"{error}{hint}") from error
    except (TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    if as_json:
        typer.echo(json.dumps(_plain(outcome), indent=2))
    else:
        _print(outcome, dry_run=settings.dry_run)


def _plain(outcome: Outcome) -> dict[str, object]:
    """Return an outcome as JSON has it."""
    found = dataclasses.asdict(outcome)
    return {**found, "target": str(outcome.target)}


def _print(outcome: Outcome, *, dry_run: bool) -> None:
    """Print what was done, or would be."""
    console = wide_console()
    total = sum(outcome.files.values())
    table = Table("file", "bytes")
    for name, size in outcome.files.items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    console.print(f"{len(outcome.carried)} other files: {', '.join(outcome.carried) or 'none'}")
    if dry_run:
        console.print(f"{outcome.target}: {total:,} bytes would be written; nothing was")
    elif outcome.finished:
        console.print(f"{outcome.target}: {total:,} bytes, whole")
    else:
        left = ", ".join(outcome.missing) or "none"
        console.print(
            f"{outcome.target}: wrote {len(outcome.written)} files; left to write: {left}"
        )
        console.print("the same command without --shard writes what is left and joins the files")
    if outcome.report is not None:
        _print_report(outcome)


def _print_report(outcome: Outcome) -> None:
    """Print what merging into INT4 cost."""
    assert outcome.report is not None
    console = wide_console()
    table = Table("module", "lost, relative", "by min-max", "the adapters' part", "largest error")
    modules = {one["module"]: one for one in outcome.report["modules"]}
    for name in outcome.report["worst"]:
        one = modules[name]
        ratios = [one[key] for key in ("relative_error", "relative_error_minmax", "relative_delta")]
        table.add_row(name, *(f"{ratio:.4f}" for ratio in ratios), f"{one['max_error']:.3g}")
    total = outcome.report["total"]
    console.print(table)
    console.print(
        f"{len(modules)} modules were quantised again, the worst are shown; in all "
        f"{total['relative_error']:.4f} lost, by min-max {total['relative_error_minmax']:.4f}"
    )
