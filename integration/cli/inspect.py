"""The command ``int4-lora inspect``.

Source: ``docs/commands/inspect.md``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int4_lora.integration.cli.console import counted, refusing_bad_input, wide_console
from int4_lora.integration.cli.options import AsJson, CheckpointPath, RenameOption, as_rename

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from int4_lora.integration.checkpoint.inspect import (
        AdapterReport,
        Inspection,
        ModuleReport,
        UnlistedReport,
    )

__all__ = ["inspect"]

MEBIBYTE = 2**20
MOST_NAMES = 8  # of unlisted tensors, without --all


def inspect(
    path: CheckpointPath,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="A PEFT adapter, checked against the checkpoint; may be repeated."),
    ] = None,
    rename: RenameOption = None,
    every_module: Annotated[
        bool,
        typer.Option(
            "--all", help="Show a row for each module; without it, equal modules share a row."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, and whether adapters fit it.

    Reads headers and scales only. Tensors that are in the files, but not in the index, are listed,
    and so are float weights that config.json calls quantised.
    Exit code 1 if a scale is NaN or infinite, or an adapter does not fit.

    Example: int4-lora inspect ./llama-w4a16 --adapter ./sql-lora
    """
    with refusing_bad_input():
        rules = as_rename(rename)
        from int4_lora.integration.adapter.read import read_adapter
        from int4_lora.integration.checkpoint import inspect as inspection
        from int4_lora.integration.checkpoint.open import open_checkpoint

        checkpoint = open_checkpoint(path)
        adapters = [read_adapter(folder) for folder in adapter or []]
        report = inspection.inspect(checkpoint, adapters, rules)
    if as_json:
        typer.echo(json.dumps(_plain(report), indent=2))
    else:
        _print(wide_console(), report, every_module)
    raise typer.Exit(0 if report.right else 1)


def _plain(report: Inspection) -> dict[str, Any]:
    plain: dict[str, Any] = dataclasses.asdict(report)
    for module, described in zip(plain["modules"], report.modules, strict=True):
        module["bf16_bytes"] = described.dense_bytes
    return {"right": report.right, **plain}


def _print(console: Console, report: Inspection, every_module: bool) -> None:
    console.print(_table(report, every_module))
    packed = sum(module.nbytes for module in report.modules)
    dense = sum(module.dense_bytes for module in report.modules)
    console.print(
        f"{counted(len(report.modules), 'quantised module')}, {packed / MEBIBYTE:.1f} MiB, "
        f"{dense / packed:.2f}x smaller than bfloat16; "
        f"{counted(report.dense_tensors, 'other tensor')}, {report.dense_bytes / MEBIBYTE:.1f} MiB"
    )
    targets = ", ".join(report.lora_targets) or "nothing"
    console.print(f"LoRA can target: {targets}", markup=False)
    for note in report.notes:
        console.print(note, markup=False, style="red")
    for unlisted in report.unlisted:
        _print_unlisted(console, unlisted, every_module)
    for adapter in report.adapters:
        _print_adapter(console, adapter)


def _print_adapter(console: Console, adapter: AdapterReport) -> None:
    ranks = ", ".join(str(rank) for rank in adapter.ranks)
    scalings = ", ".join(f"{scaling:.4g}" for scaling in adapter.scalings)
    targets = ", ".join(f"{name} x{count}" for name, count in adapter.targets.items())
    pairs = f"rank {ranks}, scaling {scalings}, on {targets}" if targets else "no pairs"
    console.print(f"{adapter.path}: {pairs}", markup=False)
    console.print(f"  made for: {adapter.base or 'it does not say'}", markup=False)
    for note in adapter.notes:
        console.print(f"  {note}", markup=False)
    for name, rows in adapter.replaced.items():
        what = name if rows is None else f"{counted(rows, 'row')} of {name}"
        console.print(f"  replaces {what}", markup=False)
    if adapter.fault is None:
        console.print("  fits", markup=False, style="green")
    else:
        why = adapter.fault.removeprefix(f"{adapter.path}: ")
        console.print(f"  does not fit: {why}", markup=False, style="red")


def _print_unlisted(console: Console, file: UnlistedReport, every_tensor: bool) -> None:
    """Print the tensors of a file that are not listed as the model's."""
    if file.fault is not None:
        console.print(f"not listed, and not readable: {file.fault}", markup=False, style="red")
    for names, what in (
        (file.tensors, f"in {file.file} and not listed as the model's"),
        (file.copies, f"in {file.file} and listed in another file"),
    ):
        shown = names if every_tensor else names[:MOST_NAMES]
        more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
        if names:
            verb = "is" if len(names) == 1 else "are"
            text = f"{counted(len(names), 'tensor')} {verb} {what}: {', '.join(shown)}{more}"
            console.print(text, markup=False, style="red")


def _table(report: Inspection, every_module: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(report.path), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("module", no_wrap=True)
    table.add_column("weights")
    for title in ("shape", "MiB", "vs bf16", "NaN, inf, 0 scales"):
        table.add_column(title, justify="right")
    for modules in _rows(report.modules, every_module):
        first = modules[0]
        count = f" x{len(modules)}" if len(modules) > 1 else ""
        special = [
            sum(getattr(module, name) for module in modules)
            for name in ("nan_scales", "infinite_scales", "zero_scales")
        ]
        nbytes = sum(module.nbytes for module in modules)
        table.add_row(
            Text((first.name if len(modules) == 1 else first.kind) + count),
            _format(first) + f"{first.bits} bit, {_strategy(first)}",
            " x ".join(str(length) for length in first.shape),
            f"{nbytes / MEBIBYTE:.2f}",
            f"{sum(module.dense_bytes for module in modules) / nbytes:.2f}x",
            ", ".join(str(number) for number in special),
            style="red" if special[0] or special[1] else None,
        )
    return table


def _rows(modules: Iterable[ModuleReport], every_module: bool) -> list[list[ModuleReport]]:
    """Return each row's modules; modules that differ only in their layer number share a row."""
    if every_module:
        return [[module] for module in modules]

    def kind(module: ModuleReport) -> tuple[str, ...]:
        fields = (
            module.kind,
            module.format,
            module.bits,
            _strategy(module),
            module.shape,
            module.nbytes,
        )
        return tuple(str(field) for field in fields)

    return [list(alike) for _, alike in groupby(sorted(modules, key=kind), key=kind)]


def _format(module: ModuleReport) -> str:
    """Return the format, unless it is that of most checkpoints."""
    from int4_lora.integration.checkpoint.scheme import PACKED_FORMAT

    return "" if module.format == PACKED_FORMAT else f"{module.format}, "


def _strategy(module: ModuleReport) -> str:
    size = module.group_size
    lengths = size if isinstance(size, tuple) else () if size is None else (size,)
    shown = " ".join(filter(None, [module.strategy, "x".join(map(str, lengths))]))
    order = ", g_idx" if module.g_idx else ""
    return f"{shown}, {'symmetric' if module.symmetric else 'asymmetric'}{order}"
