"""The commands ``int4-lora golden write`` and ``int4-lora golden check``.

Source: ``docs/commands/golden.md``, ``docs/golden-format.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from int4_lora.integration.cli.conform import collect, finish
from int4_lora.integration.cli.console import refusing_bad_input
from int4_lora.integration.cli.options import AsJson, Cases, GoldenFolder, Quick, Seed
from int4_lora.integration.cli.report import ReportFile, check_report, write_page

__all__ = ["golden"]

golden = typer.Typer(
    help="Write or check golden files, for backends in any language.",
    no_args_is_help=True,
)


@golden.command()
def write(
    folder: GoldenFolder,
    quick: Quick = False,
    cases: Cases = None,
    seed: Seed = 0,
) -> None:
    """Write a golden file for each case that makes a single call.

    DIR must be empty or new. The bytes depend on the seed alone.

    Example: int4-lora golden write ./golden --quick
    """
    from rich.console import Console
    from rich.progress import Progress

    with refusing_bad_input():
        from int4_lora.integration.conformance.golden.write import exportable, write_golden
        from int4_lora.reference.conformance import select

        selected = exportable(select(cases, quick=quick))
        if not selected:
            raise ValueError("none of these cases is a single call")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("golden files", total=len(selected))
            for _ in write_golden(folder, selected, seed):
                progress.advance(task)
    size = sum(file.stat().st_size for file in folder.iterdir())
    typer.echo(f"{folder}: {len(selected)} cases, {size / 1e6:.1f} MB")


@golden.command()
def check(
    folder: GoldenFolder,
    results: Annotated[
        Path,
        typer.Argument(metavar="RESULTS", help="A folder with a result file for each case."),
    ],
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare result files with golden files.

    Exit code 0 if all cases pass, 1 if a case failed, 2 if a folder cannot be used.

    Example: int4-lora golden check ./golden ./results
    """
    with refusing_bad_input():
        from int4_lora.integration.conformance.golden.check import check_golden, read_index
        from int4_lora.integration.conformance.golden.recorded import read_manifest
        from int4_lora.reference.conformance import settled

        manifest = read_manifest(results)
        index = read_index(folder)
        check_report(report)
        running = check_golden(folder, results, manifest, evidence=report is not None)
        outcomes = settled(collect(running, len(index["cases"]), quiet=as_json))
        write_page(report, str(results), manifest, outcomes, "cpu", index["seed"])
    finish(str(results), manifest, outcomes, "cpu", index["seed"], as_json=as_json)
