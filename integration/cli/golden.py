"""``int4-lora golden write`` and ``int4-lora golden check``.

Source: ``docs/commands/golden.md``, ``docs/golden-format.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from int4_lora.integration.cli.conform import finish, gathered
from int4_lora.integration.cli.exits import unusable
from int4_lora.integration.conformance.golden.check import check_golden, read_index
from int4_lora.integration.conformance.golden.recorded import read_manifest
from int4_lora.integration.conformance.golden.write import exportable, write_golden
from int4_lora.reference.conformance import select, settled

__all__ = ["golden"]

golden = typer.Typer(
    help="Files with inputs, exact answers and bounds, for backends in any language.",
    no_args_is_help=True,
)


@golden.command()
def write(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or new folder.")],
    quick: Annotated[bool, typer.Option("--quick", help="A third of the cases.")] = False,
    cases: Annotated[
        str | None, typer.Option(help="Names with * and ?, separated by commas.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
) -> None:
    """Write the cases that are one call; the same bytes every time.

    Example: int4-lora golden write ./golden --quick
    """
    try:
        chosen = exportable(select(cases, quick=quick))
        if not chosen:
            raise ValueError("none of these cases is a single call")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("golden files", total=len(chosen))
            for _ in write_golden(folder, chosen, seed):
                progress.advance(task)
    except (OSError, ValueError) as error:
        raise unusable(str(error)) from error
    size = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{folder}: {len(chosen)} cases, {size / 1e6:.1f} MB")


@golden.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What 'golden write' wrote.")],
    results: Annotated[Path, typer.Argument(help="A folder with a result file for each case.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Hold result files against golden files.

    Exit code 0 if all conform, 1 if a case failed, 2 if a folder cannot be used.

    Example: int4-lora golden check ./golden ./results
    """
    try:
        manifest = read_manifest(results)
        index = read_index(folder)
        outcomes = check_golden(folder, results, manifest)
        found = settled(gathered(outcomes, len(index["cases"]), quiet=as_json))
    except (OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    finish(str(results), manifest, found, "cpu", index["seed"], as_json)
