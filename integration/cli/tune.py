"""``int4-lora tune``.

Source: ``docs/commands/tune.md``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from int4_lora.compiled import PreparedWeight, prepare, prepare_lora
from int4_lora.compiled.selection.tuning import TOKENS, Point
from int4_lora.compiled.selection.tuning import tune as tune_layer
from int4_lora.integration.checkpoint.open import PARTS, Checkpoint, open_checkpoint
from int4_lora.integration.cli.console import wide_console
from int4_lora.integration.cli.exits import unusable
from int4_lora.reference import LoRAStack, PackedWeight

__all__ = ["tune"]


class Dtype(str, Enum):
    """The dtypes of x that are served."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@dataclass(frozen=True)
class Kind:
    """A kind of layer that was measured.

    Args:
        modules: the names of the modules of this kind.
        shape: ``(out_features, in_features)``.
        layout: the class of the prepared weight.
        adapters: how many adapters there were to choose from; 0 for the base alone.
        rank: their rank; 0 for the base alone.
        points: what was measured.
    """

    modules: list[str]
    shape: tuple[int, int]
    layout: str
    adapters: int
    rank: int
    points: list[Point]


def tune(
    path: Annotated[str, typer.Argument(help="A compressed-tensors checkpoint.")],
    dtype: Annotated[Dtype | None, typer.Option(help="Of x; the scales' if not given.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters to measure with.")] = 16,
    adapters: Annotated[int, typer.Option(min=0, help="To choose from; 0: base alone.")] = 4,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Rows of x to measure at; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the layers will run.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not tables.")] = False,
) -> None:
    """Measure which formulation is fastest for each kind of layer, and keep it for this machine.

    Every kind is measured alone and with adapters. What is kept is used from then on, by every
    process with this torch and number of threads.

    Example: int4-lora tune ./llama-w4a16 --rank 16 --adapters 4
    """
    try:
        where = _device(device)
        checkpoint = open_checkpoint(path)
        kinds = _kinds(checkpoint)
        asked = sorted(set(tokens or TOKENS))
        if asked[0] < 1:
            raise ValueError(f"--tokens must be 1 or more, got {asked[0]}")
        found: list[Kind] = []
        bar = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*bar, console=console, transient=True, disable=as_json) as progress:
            counts = (0, adapters) if adapters else (0,)
            task = progress.add_task("", total=len(kinds) * len(counts) * len(asked))
            for names in kinds:
                packed = checkpoint.packed_weight(names[0]).to(where)
                for count in counts:
                    progress.update(task, description=f"{names[0]}, {count} adapters")
                    chosen = getattr(torch, dtype.value) if dtype else packed.scale.dtype
                    weight = prepare(packed)
                    points = _measure(
                        weight, packed, chosen, count, rank, asked,
                        lambda _: progress.advance(task),
                    )  # fmt: skip
                    layout = type(weight).__name__
                    shape = (packed.out_features, packed.in_features)
                    found.append(Kind(names, shape, layout, count, rank if count else 0, points))
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise unusable(str(error)) from error
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
    else:
        _print(wide_console(), found)


def _device(name: str) -> torch.device:
    """Return a device that layers can run on here.

    Raises:
        ValueError: it is none, or is not there.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"--device {name} is not there: torch finds {found} GPUs")
    return device


def _kinds(checkpoint: Checkpoint) -> list[list[str]]:
    """Return the packed modules, those whose tensors have the same shapes and dtypes together."""
    kinds: dict[object, list[str]] = {}
    for name in checkpoint.modules():
        if checkpoint.is_packed(name):
            kind = (checkpoint.schemes[name], *_headers(checkpoint, name))
            kinds.setdefault(kind, []).append(name)
    if not kinds:
        raise ValueError(f"{checkpoint.path}: no module is packed in 4 or 8 bits")
    return list(kinds.values())


def _headers(checkpoint: Checkpoint, name: str) -> Iterator[object]:
    for part in PARTS:
        stored = checkpoint.tensors.get(f"{name}.{part}")
        if stored is not None:
            yield part, stored.dtype, tuple(stored.shape)
    yield checkpoint.shape_of(name)


def _measure(
    weight: PreparedWeight,
    packed: PackedWeight,
    dtype: torch.dtype,
    adapters: int,
    rank: int,
    tokens: Sequence[int],
    progress: Callable[[int], None],
) -> list[Point]:
    lora = None
    if adapters:
        device = packed.packed.device
        a = torch.randn(adapters, rank, packed.in_features, dtype=dtype, device=device)
        b = torch.randn(adapters, packed.out_features, rank, dtype=dtype, device=device)
        scaling = torch.ones(adapters, device=device)
        lora = prepare_lora(LoRAStack(a, b, scaling))
    return tune_layer(weight, dtype, lora, tokens=tokens, progress=progress)


def _print(console: Console, found: list[Kind]) -> None:
    table = Table(title="the fastest formulation, ms a call (median)")
    table.add_column("layers")
    for title in ("shape", "layout", "adapters", "tokens: formulation (ms), others (ms)"):
        table.add_column(title)
    for one in found:
        table.add_row(
            Text(one.modules[0] + (f" x{len(one.modules)}" if len(one.modules) > 1 else "")),
            " x ".join(map(str, one.shape)),
            one.layout,
            f"{one.adapters} of rank {one.rank}" if one.adapters else "none",
            "\n".join(_described(point) for point in one.points),
        )
    console.print(table)


def _described(point: Point) -> str:
    """Return a point in words, the chosen formulation first."""
    rest = sorted(
        set(point.milliseconds) - {point.chosen}, key=lambda name: point.milliseconds[name]
    )
    times = [f"{name} ({point.milliseconds[name]:.3f})" for name in (point.chosen, *rest)]
    return f"{point.tokens}: {', '.join(times)}"
