"""``int4-lora scoreboard``.

Source: ``docs/commands/scoreboard.md``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from int4_lora.atomic_files import replace_files
from int4_lora.integration.cli.conform import check_device
from int4_lora.integration.cli.console import wide_console
from int4_lora.integration.cli.exits import unusable
from int4_lora.integration.conformance.loading import registered
from int4_lora.integration.conformance.scoreboard import (
    Row,
    as_markdown,
    installed,
    replaced,
    score,
)
from int4_lora.integration.conformance.scorecard import diagnoses
from int4_lora.reference.conformance import select

__all__ = ["scoreboard"]


def scoreboard(
    backends: Annotated[
        str | None, typer.Option(help="Registered names, separated by commas.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A third of the cases.")] = False,
    device: Annotated[str, typer.Option(help="Where the operands are: cpu, cuda, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    write: Annotated[
        Path | None, typer.Option(help="A Markdown page whose table is replaced.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Hold every registered backend against the reference: who passes what?

    Exit code 0 whatever the verdicts are, 2 if none could be asked.

    Example: int4-lora scoreboard --quick
    """
    try:
        names, cases = _names(backends), select(quick=quick)
        if write is not None:
            replaced(write, "")  # before the work, which may be long
        check_device(device)
        rows = _rows(names, cases, device, seed, quiet=as_json)
        table = as_markdown(rows, device=device, seed=seed, cases=len(cases))
        if write is not None:
            replace_files({write.resolve(): replaced(write, table).encode()})
    except (OSError, ValueError) as error:
        raise unusable(str(error)) from error
    if as_json:
        found = {"versions": installed(), "device": device, "seed": seed}
        typer.echo(json.dumps({**found, "backends": [_plain(row) for row in rows]}, indent=2))
    else:
        _print(wide_console(), rows, device)
    raise typer.Exit(0 if any(row.outcomes for row in rows) else 2)


def _names(backends: str | None) -> list[str]:
    known = sorted(registered())
    if backends is None:
        return known
    wanted = [name.strip() for name in backends.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ValueError(f"no backend is registered as {name!r}; there are {known}")
    if not wanted:
        raise ValueError("no backend is named: the list is empty")
    return wanted


def _rows(names: list[str], cases: Any, device: str, seed: int, *, quiet: bool) -> list[Row]:
    rows: list[Row] = []
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=quiet)
    with redirect_stdout(sys.stderr), progress:
        task = progress.add_task("", total=len(names) * len(cases))
        for name, found in score(names, cases, device=device, seed=seed):
            if isinstance(found, Row):
                rows.append(found)
                progress.update(task, completed=len(rows) * len(cases))
            else:
                progress.update(task, advance=1, description=f"{name}: {found.case}")
    return rows


def _print(console: Console, rows: list[Row], device: str) -> None:
    known = ", ".join(f"{name} {value}" for name, value in installed().items())
    table = Table(title=f"on {device} ({known})")
    for title in ("backend", "verdict", "passed", "failed", "not claimed", "diagnoses"):
        numbers = title in ("passed", "failed", "not claimed")
        table.add_column(title, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        counts = (str(row.count(status)) for status in ("passed", "failed", "skipped"))
        named = ", ".join(f"{name} {count}" for name, count in diagnoses(row.outcomes).items())
        table.add_row(row.name, Text(row.verdict), *counts, named)
    console.print(table)


def _plain(row: Row) -> dict[str, Any]:
    failures = [dataclasses.asdict(one) for one in row.outcomes if one.status == "failed"]
    return {
        "backend": row.name,
        "verdict": row.verdict,
        "passed": row.count("passed"),
        "failed": row.count("failed"),
        "skipped": row.count("skipped"),
        "diagnosis": diagnoses(row.outcomes),
        "failures": failures,
    }
