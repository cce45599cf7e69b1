"""The commands ``int4-lora adapter quantize`` and ``int4-lora adapter dequantize``.

Source: ``docs/commands/adapter.md``.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from int4_lora.integration.cli.console import counted, refusing_bad_input, wide_console
from int4_lora.integration.cli.options import AsJson

if TYPE_CHECKING:
    from int4_lora.integration.adapter.quantize import QuantizedAdapter

__all__ = ["adapter"]

MOST_MODULES = 20  # of the table, without --all

adapter = typer.Typer(
    help="Write an adapter in INT4, or an adapter in INT4 in floats.", no_args_is_help=True
)
Source = Annotated[Path, typer.Argument(metavar="SRC", help="The folder of an adapter.")]
Target = Annotated[
    Path, typer.Argument(metavar="DST", help="The folder to write; it must not exist.")
]


@adapter.command()
def quantize(
    source: Source,
    target: Target,
    group_size: Annotated[
        int,
        typer.Option(
            help="Columns of A or B that share a scale; a matrix with no more columns has one "
            "group per row."
        ),
    ] = 128,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Store a zero-point for each group.")
    ] = False,
    every_module: Annotated[
        bool,
        typer.Option(
            "--all", help="Show every module; without it, the 20 that lost the most are shown."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter with A and B in INT4, and show what each module lost.

    Exit code 2 if the adapter cannot be read, or a matrix cannot be quantised in these groups.

    Example: int4-lora adapter quantize ./sql-lora ./sql-lora-int4
    """
    with refusing_bad_input():
        from int4_lora.integration.adapter.quantize import quantize_adapter

        written = quantize_adapter(source, target, group_size=group_size, symmetric=not asymmetric)
    if as_json:
        typer.echo(json.dumps(_plain(written), indent=2))
    else:
        _print(written, every_module)


@adapter.command()
def dequantize(source: Source, target: Target) -> None:
    """Write an adapter in INT4 as one in floats, for PEFT, vLLM and other tools.

    Exit code 2 if SRC is no adapter in INT4.

    Example: int4-lora adapter dequantize ./sql-lora-int4 ./sql-lora
    """
    with refusing_bad_input():
        from int4_lora.integration.adapter.quantize import dequantize_adapter

        written = dequantize_adapter(source, target)
    typer.echo(f"{target}: {counted(len(written.modules), 'module')}")


def _plain(written: QuantizedAdapter) -> dict[str, object]:
    return {
        "path": str(written.adapter.path),
        "bytes_before": written.nbytes_before,
        "bytes_after": written.nbytes_after,
        "modules": [dataclasses.asdict(error) for error in written.errors],
    }


def _print(written: QuantizedAdapter, every_module: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    console = wide_console()
    errors = sorted(written.errors, key=lambda error: error.delta, reverse=True)
    table = Table("module", "rank", "A lost, relative", "B lost", "B A lost")
    for error in errors if every_module else errors[:MOST_MODULES]:
        ratios = (f"{ratio:.4f}" for ratio in (error.a, error.b, error.delta))
        table.add_row(Text(error.module), str(error.rank), *ratios)
    console.print(table)
    before, after = written.nbytes_before, written.nbytes_after
    console.print(
        f"{written.adapter.path}: {counted(len(errors), 'module')}, {before:,} bytes before, "
        f"{after:,} after: {before / after:.2f} x smaller",
        markup=False,
    )
