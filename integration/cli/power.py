"""The command ``int4-lora power``.

Source: ``docs/commands/power.md``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int4_lora.integration.cli.console import refusing_bad_input, wide_console
from int4_lora.integration.cli.options import AsJson, Cases, Quick, Seed

if TYPE_CHECKING:
    from int4_lora.reference.conformance.power import Power

__all__ = ["BEGIN", "END", "as_markdown", "power"]

BEGIN, END = "<!-- the table: int4-lora power --write -->", "<!-- end of the table of power -->"
TITLES = ("diagnosis", "smallest error that is found", "found in", "for example")


def power(
    quick: Quick = False,
    cases: Cases = None,
    seed: Seed = 0,
    write: Annotated[
        Path | None,
        typer.Option(help="A Markdown file: its table is replaced; a missing file is created."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how small a mistake the conformance cases still find.

    Exit code 0 if every kind of mistake is found, 1 if a kind is found at no size.

    Example: int4-lora power --quick
    """
    with refusing_bad_input():
        from int4_lora.atomic_files import replace_files
        from int4_lora.integration.conformance.scoreboard import replaced
        from int4_lora.reference.conformance import select
        from int4_lora.reference.conformance.power import measure

        selected = select(cases, quick=quick)
        if write is not None:
            replaced(write, "", BEGIN, END)  # fails now, not after a long run
        powers = list(measure(selected, seed=seed))
        if write is not None:
            page = replaced(write, as_markdown(powers), BEGIN, END)
            replace_files({write.resolve(): page.encode()})
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(each) for each in powers], indent=2))
    else:
        _print(powers)
    raise typer.Exit(0 if all(each.found for each in powers) else 1)


def as_markdown(powers: Sequence[Power]) -> str:
    """Return the table for a page."""
    lines = [f"| {' | '.join(TITLES)} |", "|---|---|---|---|"]
    for diagnosis, error, found, example in map(_cells, powers):
        lines.append(f"| `{diagnosis}` | {error} | {found} | {example} |")
    return "\n".join(lines)


def _cells(power: Power) -> tuple[str, str, str, str]:
    """Return the cells of a row."""
    example = f"`{power.case}`: {power.rule}" if power.found else ""
    found = f"{power.found} of {power.changed} cases"
    return power.diagnosis, power.error or "none", found, example


def _print(powers: Sequence[Power]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for title in TITLES:
        table.add_column(title, overflow="fold")
    for power in powers:
        table.add_row(*(Text(cell.replace("`", "")) for cell in _cells(power)))
    wide_console().print(table)
