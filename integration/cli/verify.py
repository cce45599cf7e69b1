"""The command ``int4-lora verify``.

Source: ``docs/commands/verify.md``.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from int4_lora.integration.cli.console import refusing_bad_input, wide_console
from int4_lora.integration.cli.options import AsJson, CheckpointPath, Unlisted, choice_of

if TYPE_CHECKING:
    from rich.console import Console

    from int4_lora.integration.checkpoint.verify import Finding

__all__ = ["verify"]


def verify(path: CheckpointPath, unlisted: Unlisted = None, as_json: AsJson = False) -> None:
    """Compare every weight with compressed-tensors, bit for bit.

    Where the installed compressed-tensors is wrong, the module is listed with the known mistake.
    Exit code 1 if an INT4 module differs, 2 if a module cannot be read or none is INT4. This
    command needs the extra "checkpoints".

    Example: int4-lora verify ./llama-w4a16
    """
    from rich.console import Console
    from rich.progress import Progress

    with refusing_bad_input():
        from int4_lora.integration.checkpoint import verify as verification
        from int4_lora.integration.checkpoint.compressed_tensors import upstream_version
        from int4_lora.integration.checkpoint.layouts import GPTQ, GPTQ_V2
        from int4_lora.integration.checkpoint.open import open_checkpoint

        checkpoint = open_checkpoint(path, unlisted=choice_of(unlisted))
        checkpoint.check_listed()
        upstream = upstream_version()
    console = Console(stderr=True)
    findings: list[Finding] = []
    with Progress(console=console, transient=True, disable=as_json) as progress:
        task = progress.add_task("modules", total=len(checkpoint.modules()))
        for finding in verification.verify(checkpoint):
            findings.append(finding)
            progress.advance(task)
    counts: Counter[str] = Counter(finding.verdict for finding in findings)
    right = set(counts) <= {"same", "not_int4"} and counts["same"] > 0
    unusable = counts["unreadable"] > 0 or set(counts) == {"not_int4"}
    if as_json:
        modules = [dataclasses.asdict(finding) for finding in findings]
        report = {"right": right, "compressed_tensors": upstream, "modules": modules}
        typer.echo(json.dumps(report, indent=2))
    else:
        console = wide_console()
        _print(console, findings, counts, upstream)
        if any(scheme.format in (GPTQ, GPTQ_V2) for scheme in checkpoint.schemes.values()):
            console.print("GPTQ: the arithmetic alone; compressed-tensors does not read its layout")
    raise typer.Exit(0 if right else 2 if unusable else 1)


def _print(
    console: Console, findings: Sequence[Finding], counts: Counter[str], upstream: str
) -> None:
    from rich.table import Table
    from rich.text import Text

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
