"""The command ``int4-lora tune``.

Source: ``docs/commands/tune.md``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from int4_lora.integration.cli.console import refusing_bad_input, wide_console
from int4_lora.integration.cli.options import AsJson, CheckpointPath, Device, Dtype, as_torch

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from int4_lora.compiled import PreparedWeight
    from int4_lora.compiled.selection.tuning import Point
    from int4_lora.integration.checkpoint.open import Checkpoint
    from int4_lora.reference import PackedWeight

__all__ = ["tune"]


@dataclass(frozen=True)
class Kind:
    """The measurements for one kind of layer.

    Args:
        modules: the names of the modules of this kind.
        shape: ``(out_features, in_features)``.
        layout: the class of the prepared weight.
        adapters: the number of adapters in the stack; 0 for the base alone.
        rank: the adapters' rank; 0 for the base alone.
        points: the measurements.
    """

    modules: list[str]
    shape: tuple[int, int]
    layout: str
    adapters: int
    rank: int
    points: list[Point]


def tune(
    path: CheckpointPath,
    dtype: Annotated[
        Dtype | None, typer.Option(help="The dtype of x; by default that of the scales.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="The rank of the adapters.")] = 16,
    adapters: Annotated[
        int,
        typer.Option(min=0, help="The number of adapters to measure with; 0 for the base alone."),
    ] = 4,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            help="A number of tokens to measure at; may be repeated. [default: 1, 2, 4 ... 256]"
        ),
    ] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure which formulation is fastest on this machine.

    Each kind is measured alone and with adapters. From then on, every process on this machine with
    the same torch and number of threads uses the fastest formulation.

    Example: int4-lora tune ./llama-w4a16 --rank 16 --adapters 4
    """
    with refusing_bad_input(RuntimeError):
        counts = sorted(set(tokens)) if tokens else None
        if counts is not None and counts[0] < 1:
            raise ValueError(f"--tokens must be 1 or more, got {counts[0]}")
        where = _device(device)
        from int4_lora.compiled.selection.tuning import TOKENS
        from int4_lora.integration.checkpoint.open import open_checkpoint

        checkpoint = open_checkpoint(path)
        measured = _measure_all(
            checkpoint,
            _kinds(checkpoint),
            where,
            as_torch(dtype),
            adapters=adapters,
            rank=rank,
            tokens=counts or sorted(TOKENS),
            quiet=as_json,
        )
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(kind) for kind in measured], indent=2))
    else:
        _print(wide_console(), measured)


def _device(name: str) -> torch.device:
    """Return the device called ``name``, on which layers can run.

    Raises:
        ValueError: layers cannot run on this kind of device, or the device does not exist.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    import torch

    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device {name} is not there: torch finds {count} GPUs")
    return device


def _kinds(checkpoint: Checkpoint) -> list[list[str]]:
    """Return the packed modules, grouped by scheme and by their tensors' shapes and dtypes."""
    kinds: dict[object, list[str]] = {}
    for name in checkpoint.modules():
        if checkpoint.is_packed(name):
            kind = (checkpoint.schemes[name], *_headers(checkpoint, name))
            kinds.setdefault(kind, []).append(name)
    if not kinds:
        raise ValueError(f"{checkpoint.path}: no module is packed in 4 or 8 bits")
    return list(kinds.values())


def _headers(checkpoint: Checkpoint, name: str) -> Iterator[object]:
    for full in checkpoint.stored(name):
        stored = checkpoint.tensors[full]
        yield full.rpartition(".")[2], stored.dtype, tuple(stored.shape)
    yield checkpoint.shape_of(name)


def _measure_all(
    checkpoint: Checkpoint,
    kinds: Sequence[list[str]],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    adapters: int,
    rank: int,
    tokens: Sequence[int],
    quiet: bool,
) -> list[Kind]:
    """Measure the first module of each kind, alone and with adapters."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from int4_lora.compiled import prepare

    measured: list[Kind] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        counts = (0, adapters) if adapters else (0,)
        task = progress.add_task("", total=len(kinds) * len(counts) * len(tokens))
        for names in kinds:
            packed = checkpoint.packed_weight(names[0]).to(device)
            for count in counts:
                progress.update(task, description=f"{names[0]}, {count} adapters")
                weight = prepare(packed)
                points = _measure(
                    weight,
                    packed,
                    dtype or packed.scale.dtype,
                    count,
                    rank,
                    tokens,
                    lambda _: progress.advance(task),
                )
                layout = type(weight).__name__
                shape = (packed.out_features, packed.in_features)
                measured.append(Kind(names, shape, layout, count, rank if count else 0, points))
    return measured


def _measure(
    weight: PreparedWeight,
    packed: PackedWeight,
    dtype: torch.dtype,
    adapters: int,
    rank: int,
    tokens: Sequence[int],
    progress: Callable[[int], None],
) -> list[Point]:
    import torch

    from int4_lora.compiled import prepare_lora
    from int4_lora.compiled.selection import tuning
    from int4_lora.reference import LoRAStack

    lora = None
    if adapters:
        device = packed.packed.device
        a = torch.randn(adapters, rank, packed.in_features, dtype=dtype, device=device)
        b = torch.randn(adapters, packed.out_features, rank, dtype=dtype, device=device)
        scaling = torch.ones(adapters, device=device)
        lora = prepare_lora(LoRAStack(a, b, scaling))
    return tuning.tune(weight, dtype, lora, tokens=tokens, progress=progress)


def _print(console: Console, measured: Sequence[Kind]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="the fastest formulation, ms a call (median)")
    table.add_column("layers")
    for title in ("shape", "layout", "adapters", "tokens: formulation (ms), others (ms)"):
        table.add_column(title)
    for kind in measured:
        count = f" x{len(kind.modules)}" if len(kind.modules) > 1 else ""
        table.add_row(
            Text(kind.modules[0] + count),
            " x ".join(map(str, kind.shape)),
            kind.layout,
            f"{kind.adapters} of rank {kind.rank}" if kind.adapters else "none",
            "\n".join(_described(point) for point in kind.points),
        )
    console.print(table)


def _described(point: Point) -> str:
    """Return the times at one number of tokens as text, the chosen formulation first."""
    others = sorted(
        set(point.milliseconds) - {point.chosen}, key=lambda name: point.milliseconds[name]
    )
    times = [f"{name} ({point.milliseconds[name]:.3f})" for name in (point.chosen, *others)]
    return f"{point.tokens}: {', '.join(times)}"
