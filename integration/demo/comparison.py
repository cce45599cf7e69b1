"""Run a mixed batch through the reference, and hold every row against transformers and PEFT.

Source: the rules stand in ``findings``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from int4_lora.integration.adapter.read import Adapter, read_adapter
from int4_lora.integration.adapter.stack import check_fits
from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.integration.demo.bound_check import BoundCheck
from int4_lora.integration.demo.findings import Comparison, Row
from int4_lora.integration.demo.models import (
    Float64Inside,
    RowAdapters,
    peft_model,
    peft_name,
    reference_model,
)
from int4_lora.integration.demo.served import Batch, Served, serve

__all__ = ["compare"]

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def compare(
    model: Path,
    adapters: Mapping[str, Path],
    *,
    tokens: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    no_vllm: str | None = None,
    say: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compare one mixed batch with each of its rows alone.

    Args:
        model: the folder of a compressed-tensors checkpoint.
        adapters: the folder of each PEFT adapter, by name.
        tokens: the length of each row.
        seed: chooses the tokens.
        dtype: the low precision, bfloat16 or float16.
        no_vllm: why the batch is not served by vLLM, or None to serve it.
        say: called with each step as it starts.

    Returns:
        What was found; ``right`` tells whether every rule holds.

    Raises:
        OSError, TypeError, ValueError: files that are not there, not readable, or do not fit.
    """
    checkpoint = open_checkpoint(model)
    ours = [read_adapter(folder) for folder in adapters.values()]
    _check_usable(checkpoint, ours)
    batch = _random_batch(checkpoint, len(adapters) + 1, tokens, seed)
    rows, bounds = RowAdapters(torch.arange(-1, len(adapters))), BoundCheck(checkpoint, ours)
    name = str(dtype).removeprefix("torch.")

    folders = list(adapters.values())
    say("float64: transformers + PEFT, row by row")
    truth, _ = _run_peft(checkpoint, folders, batch, torch.float64)
    say("float64: the reference, one mixed batch")
    wide = reference_model(checkpoint, ours, rows, torch.float64)
    found64, _ = _run_reference(wide, batch, bounds, Float64Inside())
    del wide  # the largest thing here
    say(f"{name}: transformers + PEFT, row by row")
    theirs, their_seconds = _run_peft(checkpoint, folders, batch, dtype)
    if not theirs.isfinite().all():
        raise ValueError(f"{model}: transformers + PEFT itself overflows in {name}: use another")
    say(f"{name}: the reference, one mixed batch")
    narrow = reference_model(checkpoint, ours, rows, dtype)
    found, our_seconds = _run_reference(narrow, batch, bounds, nullcontext())
    del narrow
    served = Served(no_vllm, 0.0)
    if no_vllm is None:
        asked = _asked(checkpoint, adapters, ours, batch, name, truth, theirs)
        served = serve(asked, say)
    return Comparison(
        rows=[
            _judge(adapter, truth[row], found64[row], found[row], theirs[row], dtype)
            for row, adapter in enumerate(["base", *adapters])
        ],
        elements=bounds.elements,
        unbounded=bounds.unbounded,
        worst_of_bound=bounds.worst,
        our_seconds=our_seconds,
        their_seconds=their_seconds,
        dtype=name,
        served=served,
        **_sizes(checkpoint, ours),
    )


def _sizes(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, int]:
    """Return how many quantised linears there are, and the bytes of them and of the adapters.

    Dense bytes are those of the same weights in 16 bits.
    """
    packed = dense = 0
    for name in checkpoint.modules():
        weight = checkpoint.packed_weight(name)
        packed += weight.nbytes
        dense += 2 * weight.out_features * weight.in_features
    parts = [part for adapter in adapters for part in adapter.modules.values()]
    return {
        "linears": len(checkpoint.modules()),
        "packed_bytes": packed,
        "dense_bytes": dense,
        "adapter_bytes": sum(part.a.nbytes + part.b.nbytes for part in parts),
    }


def _asked(
    checkpoint: Checkpoint,
    folders: Mapping[str, Path],
    adapters: Sequence[Adapter],
    batch: Tensor,
    dtype: str,
    truth: Tensor,
    theirs: Tensor,
) -> Batch:
    """Return what vLLM is to serve, and what is right after each row."""
    ranks = [part.a.shape[0] for adapter in adapters for part in adapter.modules.values()]
    return Batch(
        model=checkpoint.path,
        adapters=[None, *folders.values()],
        rank=max(ranks, default=1),
        tokens=batch,
        most_tokens=_config_number(checkpoint, "max_position_embeddings"),
        dtype=dtype,
        truth=truth[:, -1],
        theirs=theirs[:, -1],
    )


def _random_batch(checkpoint: Checkpoint, rows: int, tokens: int, seed: int) -> Tensor:
    """Return random tokens, int64 ``[rows, tokens]``."""
    limit = _config_number(checkpoint, "max_position_embeddings")
    if not 1 <= tokens <= limit:
        raise ValueError(f"tokens must be in [1, {limit}], got {tokens}")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = _config_number(checkpoint, "vocab_size")
    return torch.randint(vocabulary, (rows, tokens), generator=generator)


def _check_usable(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Check that every quantised module is INT4 or INT8 weight-only, and that adapters fit."""
    file = checkpoint.path / "config.json"
    if checkpoint.quantization.get("kv_cache_scheme"):
        raise ValueError(f"{file}: kv_cache_scheme is set: only weights may be quantised")
    for name in checkpoint.modules():
        checkpoint.packed_weight(name)
        if checkpoint.schemes[name].activations:
            raise ValueError(f"{file}: activations of {name} are quantised: only weights may be")
    for adapter in adapters:
        check_fits(adapter, checkpoint)


def _config_number(checkpoint: Checkpoint, name: str) -> int:
    """Return a number of config.json, from ``text_config`` where a model has one."""
    value = (checkpoint.config.get("text_config") or checkpoint.config).get(name)
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


@torch.no_grad()
def _run_peft(
    checkpoint: Checkpoint, adapters: Sequence[Path], batch: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Return the logits ``[rows, tokens, vocabulary]`` of each row alone, and the seconds."""
    model = peft_model(checkpoint, adapters, dtype)
    logits, seconds = [], 0.0
    for index, row in enumerate(batch, start=-1):  # the first row has no adapter
        if index >= 0:
            model.set_adapter(peft_name(index))
        alone = model.disable_adapter() if index < 0 and adapters else nullcontext()
        with alone, Float64Inside() if dtype == torch.float64 else nullcontext():
            start = time.perf_counter()
            logits.append(model(input_ids=row[None], use_cache=False).logits[0])
            seconds += time.perf_counter() - start
    return torch.stack(logits), seconds


@torch.no_grad()
def _run_reference(
    model: nn.Module, batch: Tensor, bounds: BoundCheck, inside: AbstractContextManager[object]
) -> tuple[Tensor, float]:
    """Return the logits ``[rows, tokens, vocabulary]`` of the mixed batch, and the seconds."""
    with inside:
        start = time.perf_counter()
        logits = model(input_ids=batch, use_cache=False).logits
        seconds = time.perf_counter() - start
        bounds.watch(model)
        model(input_ids=batch, use_cache=False)
    return logits, seconds
