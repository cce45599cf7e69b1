"""``int4-lora inspect``.

Source: ``docs/commands/inspect.md``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from int4_lora.integration.adapter.read import read_adapter
from int4_lora.integration.checkpoint.inspect import Inspection, ModuleReport
from int4_lora.integration.checkpoint.inspect import inspect as inspect_checkpoint
from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.cli.console import wide_console
from int4_lora.integration.cli.exits import unusable

__all__ = ["inspect"]

MEBIBYTE = 2**20


def inspect(
    path: Annotated[str, typer.Argument(help="A compressed-tensors checkpoint.")],
    adapter: Annotated[
        list[Path] | None, typer.Option(help="A PEFT adapter that is to fit; may be repeated.")
    ] = None,
    every_module: Annotated[
        bool, typer.Option("--all", help="A row for each module, not for each kind.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Say what a checkpoint holds, and whether adapters fit it.

    Reads headers and scales only. Exit code 1 if a scale is NaN or infinite, or an adapter does
    not fit.

    Example: int4-lora inspect ./llama-w4a16 --adapter ./sql-lora
    """
    try:
        checkpoint = open_checkpoint(path)
        found = inspect_checkpoint(checkpoint, [read_adapter(folder) for folder in adapter or []])
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        _print(wide_console(), found, every_module)
    raise typer.Exit(0 if found.right else 1)


def _as_json(found: Inspection) -> dict[str, Any]:
    plain: dict[str, Any] = dataclasses.asdict(found)
    for module, report in zip(plain["modules"], found.modules, strict=True):
        module["bf16_bytes"] = report.dense_bytes
    return {"right": found.right, **plain}


def _print(console: Console, found: Inspection, every_module: bool) -> None:
    console.print(_modules(found, every_module))
    packed = sum(one.nbytes for one in found.modules)
    dense = sum(one.dense_bytes for one in found.modules)
    console.print(
        f"{len(found.modules)} quantised modules, {packed / MEBIBYTE:.1f} MiB, "
        f"{dense / packed:.2f}x smaller than bfloat16; {found.dense_tensors} other tensors, "
        f"{found.dense_bytes / MEBIBYTE:.1f} MiB"
    )
    targets = ", ".join(found.lora_targets) or "nothing"
    console.print(f"LoRA can target: {targets}", markup=False)
    for one in found.adapters:
        targets = ", ".join(f"{name} x{count}" for name, count in one.targets.items())
        ranks = ", ".join(str(rank) for rank in one.ranks)
        scalings = ", ".join(f"{scaling:.4g}" for scaling in one.scalings)
        console.print(f"{one.path}: rank {ranks}, scaling {scalings}, on {targets}", markup=False)
        console.print(f"  made for: {one.base or 'it does not say'}", markup=False)
        verdict = "fits" if one.fault is None else f"does not fit: {one.fault}"
        console.print(f"  {verdict}", markup=False, style="green" if one.fault is None else "red")


def _modules(found: Inspection, every_module: bool) -> Table:
    table = Table(title=Text(found.path), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", no_wrap=True)
    table.add_column("weights")
    for title in ("shape", "MiB", "vs bf16", "NaN, inf, 0 scales"):
        table.add_column(title, justify="right")
    for modules in _rows(found.modules, every_module):
        first = modules[0]
        many = f" x{len(modules)}" if len(modules) > 1 else ""
        special = [
            sum(getattr(one, name) for one in modules)
            for name in ("nan_scales", "infinite_scales", "zero_scales")
        ]
        nbytes = sum(one.nbytes for one in modules)
        table.add_row(
            Text((first.name if len(modules) == 1 else first.kind) + many),
            ("" if first.packed else f"{first.format}, ") + f"{first.bits} bit, {_strategy(first)}",
            " x ".join(str(length) for length in first.shape),
            f"{nbytes / MEBIBYTE:.2f}",
            f"{sum(one.dense_bytes for one in modules) / nbytes:.2f}x",
            ", ".join(str(count) for count in special),
            style="red" if special[0] or special[1] else None,
        )
    return table


def _rows(modules: Iterable[ModuleReport], every_module: bool) -> list[list[ModuleReport]]:
    """Return modules together that differ in nothing but their layer's number."""
    if every_module:
        return [[one] for one in modules]

    def alike(one: ModuleReport) -> tuple[str, ...]:
        described = (one.kind, one.format, one.bits, _strategy(one), one.shape, one.nbytes)
        return tuple(str(part) for part in described)

    return [list(same) for _, same in groupby(sorted(modules, key=alike), key=alike)]


def _strategy(one: ModuleReport) -> str:
    size = one.group_size
    grouped = (
        ""
        if size is None
        else f" {'x'.join(map(str, size))}"
        if isinstance(size, tuple)
        else f" {size}"
    )
    order = ", g_idx" if one.g_idx else ""
    return f"{one.strategy}{grouped}, {'symmetric' if one.symmetric else 'asymmetric'}{order}"
