"""Run a mixed batch through the reference, and hold every row against transformers and PEFT.

Source: the rules stand in ``findings``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from int4_lora.integration.adapter import read_adapter
from int4_lora.integration.adapter_stack import check_fits
from int4_lora.integration.checkpoint import Checkpoint, open_checkpoint
from int4_lora.integration.demo.findings import Comparison, Row
from int4_lora.integration.demo.models import (
    Float64Inside,
    ReferenceLinear,
    RowAdapters,
    peft_model,
    reference_model,
)
from int4_lora.reference import error_bound, int4_lora_linear

__all__ = ["compare"]

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def compare(
    model: Path,
    adapters: Mapping[str, Path],
    *,
    tokens: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    say: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compare one mixed batch with each of its rows alone.

    Args:
        model: the folder of a compressed-tensors checkpoint.
        adapters: the folder of each PEFT adapter, by name.
        tokens: the length of each row.
        seed: chooses the tokens.
        dtype: the low precision, bfloat16 or float16.
        say: called with each step as it starts.

    Returns:
        What was found; ``right`` tells whether every rule holds.

    Raises:
        OSError, TypeError, ValueError: files that are not there, not readable, or do not fit.
    """
    checkpoint = open_checkpoint(model)
    ours = [read_adapter(folder) for folder in adapters.values()]
    names = ["base", *adapters]
    for adapter in ours:
        check_fits(adapter, checkpoint)
    limit = _config_number(checkpoint, "max_position_embeddings")
    if not 1 <= tokens <= limit:
        raise ValueError(f"tokens must be in [1, {limit}], got {tokens}")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = _config_number(checkpoint, "vocab_size")
    batch = torch.randint(vocabulary, (len(names), tokens), generator=generator)
    rows = RowAdapters(torch.arange(-1, len(adapters)))

    say("float64: transformers + PEFT, row by row")
    truth, _ = _run_peft(checkpoint, adapters, names, batch, torch.float64)
    say("float64: the reference, one mixed batch")
    wide = reference_model(checkpoint, ours, rows, torch.float64)
    found64, _, bounds64 = _run_reference(wide, batch, Float64Inside())
    say(f"{dtype}: transformers + PEFT, row by row".removeprefix("torch."))
    theirs, their_seconds = _run_peft(checkpoint, adapters, names, batch, dtype)
    say(f"{dtype}: the reference, one mixed batch".removeprefix("torch."))
    narrow = reference_model(checkpoint, ours, rows, dtype)
    found, our_seconds, bounds = _run_reference(narrow, batch, nullcontext())

    weights = [checkpoint.packed_weight(name) for name in checkpoint.modules()]
    return Comparison(
        rows=[
            _judge(name, truth[row], found64[row], found[row], theirs[row], dtype)
            for row, name in enumerate(names)
        ],
        linears=len(weights),
        elements=bounds64.elements + bounds.elements,
        worst_of_bound=_worse(bounds64.worst, bounds.worst),
        packed_bytes=sum(weight.nbytes for weight in weights),
        dense_bytes=sum(2 * weight.out_features * weight.in_features for weight in weights),
        adapter_bytes=sum(
            part.a.nbytes + part.b.nbytes for one in ours for part in one.modules.values()
        ),
        our_seconds=our_seconds,
        their_seconds=their_seconds,
        dtype=str(dtype).removeprefix("torch."),
    )


def _config_number(checkpoint: Checkpoint, name: str) -> int:
    """Return a number of config.json, from ``text_config`` where a model has one."""
    value = checkpoint.config.get("text_config", checkpoint.config).get(name)
    if type(value) is not int or value < 1:
        file = checkpoint.path / "config.json"
        raise ValueError(f"{file}: {name} must be a positive whole number, got {value!r}")
    return value


def _judge(
    name: str, truth: Tensor, found64: Tensor, found: Tensor, theirs: Tensor, dtype: torch.dtype
) -> Row:
    return Row(
        adapter=name,
        float64_error=((found64 - truth).abs().max() / truth.abs().max()).item(),
        ours=_rms(found - truth),
        theirs=_rms(theirs - truth),
        floor=UNIT_ROUNDOFF[dtype] / 2 * _rms(truth),
    )


def _rms(values: Tensor) -> float:
    return values.to(torch.float64).square().mean().sqrt().item()


def _worse(one: float, other: float) -> float:
    """Return the larger, or NaN if either is."""
    return one if one != one or one > other else other


@torch.no_grad()
def _run_peft(
    checkpoint: Checkpoint,
    adapters: Mapping[str, Path],
    names: Sequence[str],
    batch: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, float]:
    """Return the logits ``[rows, tokens, vocabulary]`` of each row alone, and the seconds."""
    model = peft_model(checkpoint, adapters, dtype)
    logits, seconds = [], 0.0
    for name, row in zip(names, batch, strict=True):
        if name != "base":
            model.set_adapter(name)
        alone = model.disable_adapter() if name == "base" and adapters else nullcontext()
        with alone, Float64Inside() if dtype == torch.float64 else nullcontext():
            start = time.perf_counter()
            logits.append(model(input_ids=row[None], use_cache=False).logits[0])
            seconds += time.perf_counter() - start
    return torch.stack(logits), seconds


@torch.no_grad()
def _run_reference(
    model: nn.Module, batch: Tensor, inside: Any
) -> tuple[Tensor, float, _BoundCheck]:
    """Return the logits ``[rows, tokens, vocabulary]`` of the mixed batch, seconds and bounds."""
    with inside:
        start = time.perf_counter()
        logits = model(input_ids=batch, use_cache=False).logits
        seconds = time.perf_counter() - start
        bounds = _BoundCheck()
        for module in model.modules():
            if isinstance(module, ReferenceLinear):
                module.register_forward_hook(bounds)
        model(input_ids=batch, use_cache=False)
    return logits, seconds, bounds


class _BoundCheck:
    """A forward hook that holds each output of a ``ReferenceLinear`` against its bound."""

    def __init__(self) -> None:
        self.elements = 0
        self.worst = 0.0

    def __call__(self, module: ReferenceLinear, args: tuple[Tensor], output: Tensor) -> None:
        x, *others = module.operands(args[0])
        exact = int4_lora_linear(x.to(torch.float64), *others)
        error = (output.reshape(exact.shape).to(torch.float64) - exact).abs()
        bound = error_bound(x, *others)
        ratio = torch.where(error == 0, 0.0, error / bound).max().item()
        self.worst = _worse(self.worst, ratio)
        self.elements += error.numel()
