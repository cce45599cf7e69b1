"""The command ``int4-lora train``.

Source: ``docs/commands/train.md``.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from int4_lora.integration.cli.console import counted, refusing_bad_input, wide_console
from int4_lora.integration.cli.options import CheckpointPath, Dtype

if TYPE_CHECKING:
    from int4_lora.integration.huggingface.training import Settings, Trained

__all__ = ["train"]

DEVICES = ("cpu", "cuda")


def train(
    model: CheckpointPath,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help='Text, or JSON lines (.jsonl) with "text", "prompt" and "completion", or '
            '"messages".',
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="ADAPTER", help="The folder to write the adapter to.")
    ],
    rank: Annotated[int | None, typer.Option(min=1, help="The rank; by default 16.")] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="The scaling is alpha / rank; by default twice the rank."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="The modules to train, separated by commas, or all-linear; by default those that "
            "the checkpoint suggests.",
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="The most tokens of a row; by default 512, or the model's most."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="The optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="The rows in a batch.")] = 4,
    accumulate: Annotated[
        int, typer.Option(min=1, help="The batches whose gradients a step sums.")
    ] = 1,
    learning_rate: Annotated[
        float, typer.Option(help="The learning rate of the first step; it falls to zero.")
    ] = 2e-4,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="The seed of the adapter's start, of the rows' order and of the evaluation split.",
        ),
    ] = 0,
    eval_split: Annotated[
        float, typer.Option(help="The share of the data to evaluate and not to train on.")
    ] = 0.0,
    eval_every: Annotated[
        int | None,
        typer.Option(min=1, help="The steps between evaluations; by default a tenth of all."),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, help="The steps between checkpoints; by default a tenth of all."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="The dtype of activations; by default the checkpoint's, bfloat16 for float16."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; by default cuda if there is a GPU.")
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Compute activations again in the backward pass: less memory."
        ),
    ] = False,
    start_from: Annotated[
        Path | None, typer.Option(metavar="ADAPTER", help="An adapter to train further.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the unfinished run of the same command.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace an adapter once the new one is whole, or an unfinished run.",
        ),
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw the losses in loss.png; needs matplotlib.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object instead of text.")
    ] = False,
) -> None:
    """Train a LoRA adapter on an INT4 checkpoint, whose weights stay packed.

    A killed run continues with --resume. Exit code 1 if the loss is not finite; 2 if the input
    cannot be used, and then nothing is written, or if the disk is full. This command needs the
    extras "checkpoints", "hf" and "train".

    Example: int4-lora train ./llama-w4a16 notes.txt --output ./notes-lora
    """
    with refusing_bad_input():
        if device is not None and device not in DEVICES:
            raise ValueError(f"--device must be cpu or cuda, got {device!r}")
        os.environ.setdefault("TQDM_DISABLE", "1")  # compressed-tensors' bar, while a model loads
        from int4_lora.integration.huggingface.training import Settings

        settings = Settings(
            rank=rank,
            alpha=alpha,
            targets=None if targets is None else tuple(map(str.strip, targets.split(","))),
            length=length,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            seed=seed,
            eval_split=eval_split,
            eval_every=eval_every,
            save_every=save_every,
            dtype=None if dtype is None else dtype.value,
            device=device,
            checkpointing=checkpointing,
        )
    options = {"start_from": start_from, "resume": resume, "force": force, "plot": plot}
    _run(model, data, output, settings, options, as_json=as_json)


def _run(
    model: str, data: Path, output: Path, settings: Settings, options: Any, *, as_json: bool
) -> None:
    """Train with a progress bar, and print the result; end the command if the run failed."""
    import torch

    from int4_lora.integration.huggingface.training import DivergedError, train
    from int4_lora.integration.huggingface.training.progress import Bar, quiet

    started = time.perf_counter()
    quiet()
    try:
        with refusing_bad_input(), Bar(silent=as_json) as bar:
            trained = train(model, data, output, settings, watch=bar, **options)
    except DivergedError as error:
        typer.secho(f"int4-lora: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    except torch.OutOfMemoryError as error:
        way_out = "a smaller --batch or --length, or --checkpointing, needs less memory"
        typer.secho(f"int4-lora: out of memory: {way_out}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from error
    seconds = time.perf_counter() - started
    if as_json:
        result = {"output": str(trained.output), "seconds": seconds, **trained.report}
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(trained, seconds)


def _print(trained: Trained, seconds: float) -> None:
    """Print what a run did."""
    console, report = wide_console(), trained.report
    losses, settings, data = report["losses"], report["settings"], report["data"]
    console.print(
        f"{trained.output}: rank {settings['rank']}, alpha {settings['alpha']:g}, on "
        f"{', '.join(settings['targets'])}",
        markup=False,
        highlight=False,
    )
    first, last = losses[0], losses[-1]
    shown = f"loss {first['loss']:.4f} in step {first['step']}, {last['loss']:.4f} in step "
    shown += str(last["step"])
    rows = f"trained on {counted(data['rows'], 'row')} ({data['tokens']} tokens)"
    if report["evaluations"]:
        before, *_, after = (entry["loss"] for entry in report["evaluations"])
        shown += f"; evaluated {before:.4f} before, {after:.4f} after"
        rows += f", evaluated on {data['evaluation_rows']}"
    console.print(shown, markup=False, highlight=False)
    console.print(f"{rows}; {seconds:.0f} s", markup=False, highlight=False)
