"""The command ``int4-lora scoreboard``.

Source: ``docs/commands/scoreboard.md``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int4_lora.integration.cli.console import refusing_bad_input, wide_console
from int4_lora.integration.cli.options import AsJson, Device, Quick, Seed, check_device
from int4_lora.integration.cli.report import ReportFile, check_report

if TYPE_CHECKING:
    from rich.console import Console

    from int4_lora.integration.conformance.scoreboard import Row
    from int4_lora.reference.conformance import Case

__all__ = ["scoreboard"]


def scoreboard(
    backends: Annotated[
        str | None,
        typer.Option(help="Registered names, separated by commas; by default all."),
    ] = None,
    quick: Quick = False,
    device: Device = "cpu",
    seed: Seed = 0,
    write: Annotated[
        Path | None,
        typer.Option(help="A Markdown file: its table is replaced; a missing file is created."),
    ] = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare every registered backend with the reference.

    Exit code 0 whatever the verdicts are, 2 if no backend could be run.

    Example: int4-lora scoreboard --quick
    """
    with refusing_bad_input():
        from int4_lora.atomic_files import replace_files
        from int4_lora.integration.conformance.scoreboard import as_markdown, installed, replaced
        from int4_lora.reference.conformance import select

        names, cases = _names(backends), select(quick=quick)
        check_report(report)
        if write is not None:
            replaced(write, "")  # fails now, not after a long run
            if report is not None and report.resolve() == write.resolve():
                raise ValueError(f"--write and --report must be two files, got {report}")
        check_device(device)
        rows = _score(names, cases, device, seed, quiet=as_json, evidence=report is not None)
        table = as_markdown(rows, device=device, seed=seed, cases=len(cases))
        if write is not None:
            replace_files({write.resolve(): replaced(write, table).encode()})
        if report is not None:
            from int4_lora.integration.conformance.report import scoreboard_page, write_report

            page = scoreboard_page(rows, installed(), device=device, seed=seed)
            write_report(report, page)
    if as_json:
        facts = {"versions": installed(), "device": device, "seed": seed}
        typer.echo(json.dumps({**facts, "backends": [_plain(row) for row in rows]}, indent=2))
    else:
        _print(wide_console(), rows, device)
    raise typer.Exit(0 if any(row.outcomes for row in rows) else 2)


def _names(backends: str | None) -> list[str]:
    from int4_lora.integration.conformance.loading import registered

    known = sorted(registered())
    if backends is None:
        return known
    wanted = [name.strip() for name in backends.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ValueError(f"--backends: no backend is registered as {name!r}; there are {known}")
    if not wanted:
        raise ValueError("--backends: the list is empty")
    return wanted


def _score(
    names: Sequence[str],
    cases: Sequence[Case],
    device: str,
    seed: int,
    *,
    quiet: bool,
    evidence: bool,
) -> list[Row]:
    from rich.console import Console
    from rich.progress import Progress

    from int4_lora.integration.conformance.scoreboard import Row, score

    rows: list[Row] = []
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True, disable=quiet)
    with redirect_stdout(sys.stderr), progress:  # stdout is for the report, not for backends
        task = progress.add_task("", total=len(names) * len(cases))
        running = score(names, cases, device=device, seed=seed, evidence=evidence)
        for name, result in running:
            if isinstance(result, Row):
                rows.append(result)
                progress.update(task, completed=len(rows) * len(cases))
            else:
                progress.update(task, advance=1, description=f"{name}: {result.case}")
    return rows


def _print(console: Console, rows: Sequence[Row], device: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from int4_lora.integration.conformance.scoreboard import installed
    from int4_lora.integration.conformance.scorecard import diagnoses

    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    table = Table(title=f"on {device} ({versions})")
    for title in ("backend", "verdict", "passed", "failed", "not claimed", "diagnoses"):
        numbers = title in ("passed", "failed", "not claimed")
        table.add_column(title, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        counts = (str(row.count(status)) for status in ("passed", "failed", "skipped"))
        named = ", ".join(f"{name} {count}" for name, count in diagnoses(row.outcomes).items())
        table.add_row(row.name, Text(row.verdict), *counts, named)
    console.print(table)


def _plain(row: Row) -> dict[str, Any]:
    from int4_lora.integration.conformance.scorecard import diagnoses

    failures = [
        dataclasses.asdict(dataclasses.replace(outcome, evidence=None))
        for outcome in row.outcomes
        if outcome.status == "failed"
    ]
    for failure in failures:
        del failure["evidence"]
    return {
        "backend": row.name,
        "verdict": row.verdict,
        "passed": row.count("passed"),
        "failed": row.count("failed"),
        "skipped": row.count("skipped"),
        "diagnosis": diagnoses(row.outcomes),
        "failures": failures,
    }
