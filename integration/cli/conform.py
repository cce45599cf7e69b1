"""``int4-lora conform``.

Source: ``docs/commands/conform.md``.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from int4_lora.integration.cli.console import wide_console
from int4_lora.integration.cli.exits import unusable
from int4_lora.integration.conformance.golden.recorded import read_manifest, run_recorded
from int4_lora.integration.conformance.loading import load_backend, registered
from int4_lora.integration.conformance.scorecard import as_json, conforms, print_scorecard
from int4_lora.reference.conformance import Case, Manifest, Outcome, run, select, settled

__all__ = ["check_device", "conform", "finish", "gathered"]


def conform(
    backend: Annotated[
        str,
        typer.Argument(help="module:object, a registered name, or a folder of result files."),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="A third of the cases.")] = False,
    device: Annotated[str, typer.Option(help="Where the operands are: cpu, cuda, ...")] = "cpu",
    cases: Annotated[
        str | None, typer.Option(help="Names with * and ?, separated by commas.")
    ] = None,
    seed: Annotated[str, typer.Option(help="Of the inputs: a number, or 'fresh'.")] = "0",
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Hold a backend against the reference: is it right, and if not, which rule does it break?

    Exit code 0 if it conforms, 1 if a case failed, 2 if it cannot be used or nothing was judged.

    Example: int4-lora conform int4_lora.reference --quick
    """
    try:
        number = _seed(seed)
        chosen = select(cases, quick=quick)
        check_device(device)
        manifest, outcomes = _outcomes(backend, chosen, number, device)
        found = settled(gathered(outcomes, len(chosen), quiet=as_json_))
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    finish(backend, manifest, found, device, number, as_json_)


def check_device(device: str) -> None:
    """Check that operands can be on a device.

    Raises:
        ValueError: they cannot.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _seed(text: str) -> int:
    if text == "fresh":
        return secrets.randbelow(2**31)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--seed must be a number or 'fresh', got {text!r}") from None


def gathered(outcomes: Iterable[Outcome], total: int, *, quiet: bool) -> list[Outcome]:
    """Return the outcomes of a run, with a progress bar on stderr while they come."""
    found: list[Outcome] = []
    columns = (
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=quiet)
    with redirect_stdout(sys.stderr), progress:  # what a backend prints is not the report
        task = progress.add_task("", total=total, failed=0)
        for outcome in outcomes:
            found.append(outcome)
            failed = sum(one.status == "failed" for one in found)
            progress.update(task, advance=1, failed=failed, description=outcome.case)
    return found


def finish(
    name: str,
    manifest: Manifest,
    outcomes: Sequence[Outcome],
    device: str,
    seed: int,
    as_json_: bool,
) -> None:
    """Print what came of a run, and exit with its code."""
    if as_json_:
        typer.echo(json.dumps(as_json(name, manifest, outcomes, device, seed), indent=2))
    else:
        print_scorecard(wide_console(), name, outcomes, device, seed)
    verdict = conforms(outcomes)
    raise typer.Exit(2 if verdict is None else 0 if verdict else 1)


def _outcomes(
    spec: str, cases: Sequence[Case], seed: int, device: str
) -> tuple[Manifest, Iterable[Outcome]]:
    """Return the claims, and the outcomes as they come."""
    folder = Path(spec)
    if spec and folder.is_dir() and spec not in registered():
        manifest = read_manifest(folder)
        return manifest, run_recorded(folder, cases, manifest, seed)
    backend = load_backend(spec)
    return backend.manifest, run(backend, cases, seed=seed, device=device)
