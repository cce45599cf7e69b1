"""The option ``--report`` of the commands that judge backends.

Source: ``docs/commands/conform.md``, "The report".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from int4_lora.reference.conformance import Manifest, Outcome

__all__ = ["ReportFile", "check_report", "write_page"]

ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html",
        help="Write a page with heat maps of the failures; needs matplotlib. Only a report is "
        "replaced.",
    ),
]


def check_report(file: Path | None) -> None:
    """Check, before a run, that its report can be drawn and written; None is no report.

    Raises:
        ImportError: a library that draws it is missing.
        OSError: the file that is there cannot be read.
        ValueError: it would replace a file that is no report.
    """
    if file is not None:
        from int4_lora.integration.conformance.report import check_can_draw, check_replaceable

        check_can_draw()
        check_replaceable(file)


def write_page(
    file: Path | None,
    name: str,
    manifest: Manifest,
    outcomes: Sequence[Outcome],
    device: str,
    seed: int,
    *,
    left: int = 0,
) -> None:
    """Write the report of a run, of which ``left`` cases were not run; None is no report."""
    if file is not None:
        from int4_lora.integration.conformance.report import run_page, write_report

        write_report(file, run_page(name, manifest, outcomes, device, seed, left=left))
