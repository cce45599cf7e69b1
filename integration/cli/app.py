"""The command line ``int4-lora``, which combines the commands of the other modules.

Exit codes: 0 for success, 1 if a check failed, 2 for unusable input. Commands import torch and rich
in their bodies, so that ``--help``, ``--version`` and usage errors do not wait for these imports.

Source: ``docs/commands/README.md``.
"""

from __future__ import annotations

from typing import Annotated

import typer

import int4_lora
from int4_lora.integration.cli.adapter import adapter
from int4_lora.integration.cli.annotate import annotate
from int4_lora.integration.cli.conform import conform
from int4_lora.integration.cli.convert import convert
from int4_lora.integration.cli.demo import demo
from int4_lora.integration.cli.doctor import doctor
from int4_lora.integration.cli.golden import golden
from int4_lora.integration.cli.inspect import inspect
from int4_lora.integration.cli.merge import merge
from int4_lora.integration.cli.power import power
from int4_lora.integration.cli.scoreboard import scoreboard
from int4_lora.integration.cli.train import train
from int4_lora.integration.cli.tune import tune
from int4_lora.integration.cli.unpack import unpack
from int4_lora.integration.cli.verify import verify

__all__ = ["app"]

app = typer.Typer(
    name="int4-lora",
    help="Inspect, convert and check INT4 checkpoints, train LoRA adapters, and check kernels.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"int4-lora {int4_lora.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Inspect, convert and check INT4 checkpoints, train LoRA adapters, and check kernels."""


for command in (
    inspect,
    verify,
    unpack,
    merge,
    convert,
    annotate,
    train,
    tune,
    doctor,
    demo,
    conform,
    scoreboard,
    power,
):
    app.command()(command)
app.add_typer(adapter, name="adapter")
app.add_typer(golden, name="golden")
