"""The command ``int4-lora conform``.

Source: ``docs/commands/conform.md``.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int4_lora.integration.cli.console import refusing_bad_input, wide_console
from int4_lora.integration.cli.options import AsJson, Cases, Device, Quick, check_device
from int4_lora.integration.cli.report import ReportFile, check_report, write_page

if TYPE_CHECKING:
    from int4_lora.reference.conformance import Case, Manifest, Outcome

__all__ = ["collect", "conform", "finish"]


def conform(
    backend: Annotated[
        str,
        typer.Argument(
            metavar="BACKEND",
            help="module:object, a registered name, or a folder of result files.",
        ),
    ],
    quick: Quick = False,
    device: Device = "cpu",
    report: ReportFile = None,
    cases: Cases = None,
    seed: Annotated[
        str, typer.Option(help="The seed of the random inputs: a number, or 'fresh'.")
    ] = "0",
    first: Annotated[bool, typer.Option("--first", help="Stop at the first failure.")] = False,
    time_limit: Annotated[
        float,
        typer.Option(
            min=0,
            max=86_400,
            help="Seconds that a case may take; 0 runs the backend in this process, without limit.",
        ),
    ] = 300,
    as_json: AsJson = False,
) -> None:
    """Check a backend against the reference and name its mistakes.

    Exit code 0 if the backend conforms, 1 if a case failed, 2 if the backend cannot be used or no
    case was judged.

    Example: int4-lora conform int4_lora.reference --quick
    """
    with refusing_bad_input():
        number = _seed(seed)
        check_report(report)
        from int4_lora.reference.conformance import select, settled

        selected = select(cases, quick=quick)
        check_device(device)
        evidence = report is not None
        manifest, running = _run(backend, selected, number, device, time_limit, evidence)
        outcomes = settled(collect(running, len(selected), quiet=as_json, first=first))
        left = len(selected) - len(outcomes)
        write_page(report, backend, manifest, outcomes, device, number, left=left)
    finish(backend, manifest, outcomes, device, number, as_json=as_json, left=left)


def collect(
    running: Iterable[Outcome], total: int, *, quiet: bool, first: bool = False
) -> list[Outcome]:
    """Return the outcomes of a run, showing a progress bar on stderr meanwhile.

    Args:
        running: yields the outcome of each case when the case is done.
        total: the number of cases.
        quiet: whether to omit the progress bar.
        first: whether to stop at the first failure.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    outcomes: list[Outcome] = []
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=quiet)
    with redirect_stdout(sys.stderr), progress:  # stdout is for the report, not for backends
        task = progress.add_task("", total=total, failed=0)
        for outcome in running:
            outcomes.append(outcome)
            failed = sum(outcome.status == "failed" for outcome in outcomes)
            progress.update(task, advance=1, failed=failed, description=outcome.case)
            if first and failed:
                break
    return outcomes


def finish(
    name: str,
    manifest: Manifest,
    outcomes: Sequence[Outcome],
    device: str,
    seed: int,
    *,
    as_json: bool,
    left: int = 0,
) -> None:
    """Print the outcomes of a run, and exit with the run's exit code.

    Args:
        name: the backend.
        manifest: its claims.
        outcomes: settled.
        device: the device of the operands.
        seed: of the inputs.
        as_json: whether to print JSON.
        left: the number of cases that were not run after the first failure.
    """
    from int4_lora.integration.conformance import scorecard

    if as_json:
        plain = scorecard.as_json(name, manifest, outcomes, device, seed)
        typer.echo(json.dumps({**plain, "not_run": left}, indent=2))
    else:
        scorecard.print_scorecard(wide_console(), name, outcomes, device, seed)
        if left:
            typer.echo(f"stopped at the first failure: {left} cases were not run")
    verdict = scorecard.conforms(outcomes)
    raise typer.Exit(2 if verdict is None else 0 if verdict else 1)


def _seed(text: str) -> int:
    if text == "fresh":
        return secrets.randbelow(2**31)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--seed must be a number or 'fresh', got {text!r}") from None


def _run(
    spec: str, cases: Sequence[Case], seed: int, device: str, limit: float, evidence: bool
) -> tuple[Manifest, Iterable[Outcome]]:
    """Return a backend's manifest, and an iterator over its outcomes."""
    from int4_lora.integration.conformance.golden.recorded import read_manifest, run_recorded
    from int4_lora.integration.conformance.isolated import IsolatedRun
    from int4_lora.integration.conformance.loading import load_backend, registered
    from int4_lora.reference.conformance import run

    folder = Path(spec)
    if spec and folder.is_dir() and spec not in registered():
        manifest = read_manifest(folder)
        return manifest, run_recorded(folder, cases, manifest, seed, evidence=evidence)
    if limit:
        isolated = IsolatedRun(
            spec, cases, seed=seed, device=device, limit=limit, evidence=evidence
        )
        return isolated.manifest, isolated.outcomes()
    backend = load_backend(spec)
    return backend.manifest, run(backend, cases, seed=seed, device=device, evidence=evidence)
