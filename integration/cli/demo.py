"""The command ``int4-lora demo``.

Source: ``docs/commands/demo.md``.
"""

from __future__ import annotations

import json
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from int4_lora.disk_cache import cache_folder
from int4_lora.integration.cli.console import unusable, wide_console
from int4_lora.integration.cli.options import AsJson

__all__ = ["demo"]


class LowPrecision(str, Enum):
    """The 16-bit dtypes that a model can run in."""

    bfloat16 = "bfloat16"
    float16 = "float16"


def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="A compressed-tensors INT4 checkpoint; by default a small one is made."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A PEFT adapter for --model; may be repeated."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="The length of each row.")] = 32,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The seed of the random tokens.")
    ] = 0,
    dtype: Annotated[
        LowPrecision, typer.Option(help="The low precision to compare.")
    ] = LowPrecision.bfloat16,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where to keep the small model; by default in ~/.cache/int4-lora."),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--vllm/--no-vllm", help="Also serve the batch through vLLM, if it is installed."
        ),
    ] = True,
    require_vllm: Annotated[
        bool,
        typer.Option("--require-vllm", help="Exit with code 2 if vLLM does not serve the batch."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare a mixed batch with transformers + PEFT, row by row.

    The batch has a row without adapter and a row for each adapter. The truth is transformers +
    PEFT in float64, on the weights that compressed-tensors decompresses, so --model needs memory
    for the model in float64. If vLLM is installed, it then serves the same batch, with its own
    kernels and with int4_lora.

    Example: int4-lora demo --model ./llama-w4a16 --adapter sql=./sql-lora --adapter chat=./chat
    """
    try:
        folders = _named_folders(adapter or [])
        if model is None and folders:
            raise ValueError("--adapter needs --model: the made model has adapters of its own")
        if model is not None and cache is not None:
            raise ValueError("--cache is where a model is made: it has no effect with --model")
        no_vllm = _no_vllm(serve=serve, required=require_vllm)
        _quiet()
        from rich.console import Console

        with Console(stderr=True).status("loading transformers and PEFT") as status:
            import torch

            from int4_lora.integration.demo import comparison, recipe, report

            if model is None:
                status.update("making the model and its adapters")
                made = recipe.prepare(cache or cache_folder())
                model, folders = made.model, dict(made.adapters)
            result = comparison.compare(
                model,
                folders,
                tokens=tokens,
                seed=seed,
                dtype=getattr(torch, dtype.value),
                no_vllm=no_vllm,
                say=status.update,
            )
    except ModuleNotFoundError as error:
        raise unusable(f"{error}; it comes with int4-lora[checkpoints,hf]") from error
    except ImportError as error:
        raise unusable(f"a package does not load: {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    if as_json:
        typer.echo(json.dumps(report.as_json(result), indent=2, allow_nan=False))
    else:
        report.print_comparison(wide_console(), result)
    if require_vllm and not result.served.ran:
        raise unusable(result.served.why_not or "vLLM did not serve the batch")
    raise typer.Exit(0 if result.right else 1)


def _no_vllm(*, serve: bool, required: bool) -> str | None:
    """Return why vLLM will not serve the batch, or None if it will."""
    from int4_lora.integration.demo import served

    if not serve:
        if required:
            raise ValueError("--require-vllm needs vLLM: leave out --no-vllm")
        return "--no-vllm"
    reason = served.why_not()
    if required and reason is not None:
        raise ValueError(reason)
    return reason


def _named_folders(adapters: list[str]) -> dict[str, Path]:
    """Return NAME=PATH options as folders by name."""
    folders: dict[str, Path] = {}
    for option in adapters:
        name, equals, folder = option.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter must be NAME=PATH, got {option!r}")
        if name == "base" or name in folders:
            raise ValueError(f"--adapter names must differ from each other and 'base': {name!r}")
        folders[name] = Path(folder)
    return folders


def _quiet() -> None:
    """Silence what transformers and PEFT print while they build models from local files."""
    warnings.filterwarnings("ignore", module=r"(transformers|peft|compressed_tensors)\b")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
