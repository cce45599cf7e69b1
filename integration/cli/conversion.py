"""Options, progress and output shared by ``unpack``, ``merge`` and ``convert``.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int4_lora.integration.cli.console import counted, unusable, wide_console

if TYPE_CHECKING:
    from int4_lora.integration.conversion.convert import Conversion, Outcome, Settings

__all__ = [
    "DryRun",
    "Force",
    "Jobs",
    "MaxShardSize",
    "Share",
    "Target",
    "as_settings",
    "run",
]

MOST_JOBS = 64
Target = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        help="How many tensors to work on at a time; by default the number of processors, up to 4."
    ),
]
Share = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Write only the I-th of N shares of the files."),
]
MaxShardSize = Annotated[float, typer.Option(help="The most GB of tensors in a file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")
]


def as_settings(
    jobs: int | None, share: str | None, max_shard_size: float, *, force: bool, dry_run: bool
) -> Settings:
    """Convert options to settings.

    Raises:
        ValueError: an option is wrong; the message names it.
    """
    if jobs is None:
        jobs = min(4, os.cpu_count() or 1)
    if not 1 <= jobs <= MOST_JOBS:
        raise ValueError(f"--jobs must be in [1, {MOST_JOBS}], got {jobs}")
    if not 1e-6 <= max_shard_size <= 1e6:
        raise ValueError(f"--max-shard-size must be in [1e-6, 1e6] GB, got {max_shard_size:g}")
    number = None
    if share is not None:
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", share)
        number = (int(match[1]), int(match[2])) if match else None
        if number is None or not 1 <= number[0] <= number[1]:
            raise ValueError(f"--shard must be I/N with I in 1 to N, got {share!r}")
    from int4_lora.integration.conversion.convert import Settings

    most_bytes = int(max_shard_size * 1e9)
    return Settings(jobs, number, most_bytes=most_bytes, force=force, dry_run=dry_run)


def run(plan: Conversion, target: Path, settings: Settings, *, as_json: bool) -> None:
    """Run a conversion with a progress bar and print what it did; end the command if it failed."""
    from int4_lora.integration.conversion.merge_report import MergeRefusedError

    try:
        outcome = _with_progress(plan, target, settings, silent=as_json)
    except MergeRefusedError as error:
        if as_json:
            typer.echo(json.dumps({"finished": False, "report": error.report}, indent=2))
        typer.secho(f"int4-lora: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; once there is room, the same command continues where it stopped" if full else ""
        raise unusable(f"{error}{hint}") from error
    except (TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    if as_json:
        plain = {**dataclasses.asdict(outcome), "target": str(outcome.target)}
        typer.echo(json.dumps(plain, indent=2))
    else:
        _print(outcome, dry_run=settings.dry_run)


def _with_progress(plan: Conversion, target: Path, settings: Settings, *, silent: bool) -> Outcome:
    """Run a conversion; show how far it is on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from int4_lora.integration.conversion.convert import convert

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=silent or not console.is_terminal
    ) as progress:
        bar = progress.add_task("writing", total=None)
        with_progress = dataclasses.replace(
            settings,
            advance=lambda count: progress.advance(bar, count),
            begin=lambda total: progress.update(bar, total=total),
        )
        return convert(plan, target, with_progress)


def _print(outcome: Outcome, *, dry_run: bool) -> None:
    """Print what the run did, or would do."""
    from rich.table import Table

    console = wide_console()
    total = sum(outcome.files.values())
    table = Table("file", "bytes")
    for name, size in outcome.files.items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    others = f"{counted(len(outcome.carried), 'other file')}: {', '.join(outcome.carried)}"
    console.print(others if outcome.carried else "no other files", markup=False)
    for note in outcome.notes:
        console.print(note, markup=False)
    if outcome.left:
        console.print(f"weights left behind: {', '.join(outcome.left)}", markup=False)
    for reason, count in Counter(outcome.dropped.values()).items():
        console.print(f"tensors without a place in the result: {count}: each {reason}")
    if dry_run:
        console.print(f"{outcome.target}: {total:,} bytes would be written; nothing was")
    elif outcome.finished:
        console.print(f"{outcome.target}: {total:,} bytes, whole")
    else:
        left = ", ".join(outcome.missing) or "none"
        console.print(
            f"{outcome.target}: wrote {counted(len(outcome.written), 'file')}; "
            f"left to write: {left}"
        )
        console.print("the same command without --shard writes what is left and joins the files")
    if outcome.report is not None:
        _print_report(outcome)


def _print_report(outcome: Outcome) -> None:
    """Print the error of merging into INT4."""
    from rich.table import Table

    assert outcome.report is not None
    console = wide_console()
    if not outcome.report["modules"]:
        console.print("no module was quantised again")
        return
    from int4_lora.integration.conversion.merge_report import LEAST_KEPT

    titles = ("lost, relative", "by min-max", "the adapters' part", "of that kept")
    table = Table("module", *titles, "largest error")
    modules = {module["module"]: module for module in outcome.report["modules"]}
    for name in outcome.report["worst"]:
        module = modules[name]
        keys = ("relative_error", "relative_error_minmax", "relative_delta", "delta_kept")
        ratios = (f"{module[key]:.4f}" for key in keys)
        table.add_row(name, *ratios, f"{module['max_error']:.3g}")
    total = outcome.report["total"]
    shown = ", the worst are shown" if len(outcome.report["worst"]) < len(modules) else ""
    console.print(table)
    console.print(
        f"quantised again: {counted(len(modules), 'module')}{shown}; in all "
        f"{total['relative_error']:.4f} lost, by min-max {total['relative_error_minmax']:.4f}; the "
        f"adapters' part is {total['relative_delta']:.4f}"
    )
    if total["delta_kept"] < LEAST_KEPT:
        console.print(
            f"most of what the adapters add was lost: {total['delta_kept']:.2f} of it is in the "
            "result. A dense merge, or the adapter beside the packed weights, keeps it"
        )
