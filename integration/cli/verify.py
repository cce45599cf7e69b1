"""``int4-lora verify``.

Source: ``docs/commands/verify.md``.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from int4_lora.integration.checkpoint.compressed_tensors import upstream_version
from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.checkpoint.verify import Finding
from int4_lora.integration.checkpoint.verify import verify as verify_checkpoint
from int4_lora.integration.cli.console import wide_console
from int4_lora.integration.cli.exits import unusable

__all__ = ["verify"]


def verify(
    path: Annotated[str, typer.Argument(help="A compressed-tensors checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Hold every module against compressed-tensors' own decompression, bit for bit.

    A module that the installed compressed-tensors gets wrong is named with its mistake. Exit code
    1 unless every INT4 module is the same; 2 if one cannot be read, or there is none.

    Example: int4-lora verify ./llama-w4a16
    """
    try:
        checkpoint = open_checkpoint(path)
        upstream = upstream_version()
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    console = Console(stderr=True)
    findings: list[Finding] = []
    with Progress(console=console, transient=True, disable=as_json) as progress:
        task = progress.add_task("modules", total=len(checkpoint.modules()))
        for finding in verify_checkpoint(checkpoint):
            findings.append(finding)
            progress.advance(task)
    counts: Counter[str] = Counter(finding.verdict for finding in findings)
    right = set(counts) <= {"same", "not_int4"} and counts["same"] > 0
    unread = counts["unreadable"] > 0 or set(counts) == {"not_int4"}
    if as_json:
        plain = [dataclasses.asdict(finding) for finding in findings]
        found = {"right": right, "compressed_tensors": upstream, "modules": plain}
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(wide_console(), findings, counts, upstream)
    raise typer.Exit(0 if right else 2 if unread else 1)


def _print(console: Console, findings: list[Finding], counts: Counter[str], upstream: str) -> None:
    table = Table(title=f"against compressed-tensors {upstream}")
    for title in ("module", "verdict", "why"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        if finding.verdict != "same":
            table.add_row(Text(finding.name), finding.verdict, Text(finding.detail))
    if table.row_count:
        console.print(table)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    console.print(f"{len(findings)} modules against compressed-tensors {upstream}: {summary}")
