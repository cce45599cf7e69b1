"""Run a mixed batch through the reference, and each of its rows through transformers + PEFT.

The rules are those of ``int4_lora.integration.demo.findings``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.adapter.read import read_adapter
from int4_lora.integration.adapter.stack import check_fits
from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.integration.demo.findings import Comparison, Row
from int4_lora.integration.demo.linear_check import LinearCheck
from int4_lora.integration.demo.models import (
    Float64Inside,
    RowAdapters,
    peft_model,
    peft_name,
    reference_model,
)
from int4_lora.integration.demo.served import Batch, Served, serve
from int4_lora.reference.bounds import FORMATS
from int4_lora.reference.conformance.judging.verdict import rms_of

__all__ = ["compare"]


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
        seed: the seed of the random tokens.
        dtype: the low precision, bfloat16 or float16.
        no_vllm: why vLLM does not serve the batch, or None to serve it through vLLM.
        say: called with a description of each step before the step starts.

    Returns:
        The comparison; ``right`` is true if every rule holds.

    Raises:
        OSError, TypeError, ValueError: a file does not exist, cannot be read, or does not fit.
    """
    checkpoint = open_checkpoint(model)
    checkpoint.check_compressed_tensors("the demo")
    folders = list(adapters.values())
    opened = [read_adapter(folder) for folder in folders]
    _check_usable(checkpoint, opened)
    batch = _random_batch(checkpoint, len(adapters) + 1, tokens, seed)
    linears = LinearCheck(checkpoint, opened)
    name = str(dtype).removeprefix("torch.")

    say("float64: transformers + PEFT, row by row")
    truth, _ = _run_peft(checkpoint, folders, batch, torch.float64)
    say("float64: the reference, one mixed batch")
    ours64, _ = _run_reference(checkpoint, opened, batch, torch.float64, linears)
    say(f"{name}: transformers + PEFT, row by row")
    theirs, their_seconds = _run_peft(checkpoint, folders, batch, dtype)
    if not theirs.isfinite().all():
        raise ValueError(f"{model}: transformers + PEFT itself overflows in {name}: use another")
    say(f"{name}: the reference, one mixed batch")
    ours, our_seconds = _run_reference(checkpoint, opened, batch, dtype, linears)
    served = Served(no_vllm, 0.0)
    if no_vllm is None:
        served = serve(_to_serve(checkpoint, folders, opened, batch, name, truth, theirs), say)
    return Comparison(
        rows=[
            _compare_row(adapter, truth[row], ours64[row], ours[row], theirs[row], dtype)
            for row, adapter in enumerate(["base", *adapters])
        ],
        elements=linears.elements,
        unbounded=linears.unbounded,
        worst_of_bound=linears.worst,
        wrong_linear=linears.finding,
        our_seconds=our_seconds,
        their_seconds=their_seconds,
        dtype=name,
        served=served,
        **_sizes(checkpoint, opened),
    )


def _sizes(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, int]:
    """Return the number of quantised linears, and the bytes of weights and adapters."""
    packed = dense = 0
    for name in checkpoint.modules():
        weight = checkpoint.packed_weight(name)
        packed += weight.nbytes
        dense += 2 * weight.out_features * weight.in_features
    modules = [module for adapter in adapters for module in adapter.modules.values()]
    return {
        "linears": len(checkpoint.modules()),
        "packed_bytes": packed,
        "dense_bytes": dense,
        "adapter_bytes": sum(module.a.nbytes + module.b.nbytes for module in modules),
    }


def _to_serve(
    checkpoint: Checkpoint,
    folders: Sequence[Path],
    adapters: Sequence[Adapter],
    batch: Tensor,
    dtype: str,
    truth: Tensor,
    theirs: Tensor,
) -> Batch:
    """Return the batch for vLLM to serve, with the right logits after each row."""
    ranks = [module.a.shape[0] for adapter in adapters for module in adapter.modules.values()]
    return Batch(
        model=checkpoint.path,
        adapters=[None, *folders],
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
    """Check that every quantised module is weight-only INT4 or INT8, and that adapters fit."""
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
    """Return a number from config.json, or from its ``text_config`` if it has one."""
    value = (checkpoint.config.get("text_config") or checkpoint.config).get(name)
    if type(value) is not int or value < 1:
        file = checkpoint.path / "config.json"
        raise ValueError(f"{file}: {name} must be a positive whole number, got {value!r}")
    return value


def _compare_row(
    adapter: str, truth: Tensor, ours64: Tensor, ours: Tensor, theirs: Tensor, dtype: torch.dtype
) -> Row:
    return Row(
        adapter=adapter,
        float64_error=((ours64 - truth).abs().max() / truth.abs().max()).item(),
        ours=rms_of(ours - truth),
        theirs=rms_of(theirs - truth),
        floor=FORMATS[dtype].u / 2 * rms_of(truth),
    )


@torch.no_grad()
def _run_peft(
    checkpoint: Checkpoint, adapters: Sequence[Path], batch: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """Run each row alone; return the logits ``[rows, tokens, vocabulary]`` and the seconds."""
    model = peft_model(checkpoint, adapters, dtype)
    logits, seconds = [], 0.0
    for index, row in enumerate(batch, start=-1):  # the first row has no adapter
        if index >= 0:
            model.set_adapter(peft_name(index))
        alone = model.disable_adapter() if index < 0 and adapters else nullcontext()
        with alone, _inside(dtype):
            start = time.perf_counter()
            logits.append(model(input_ids=row[None], use_cache=False).logits[0])
            seconds += time.perf_counter() - start
    return torch.stack(logits), seconds


@torch.no_grad()
def _run_reference(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    batch: Tensor,
    dtype: torch.dtype,
    linears: LinearCheck,
) -> tuple[Tensor, float]:
    """Run the mixed batch; return the logits ``[rows, tokens, vocabulary]`` and the seconds.

    Every linear is judged in a second forward pass, which is not timed.
    """
    rows = RowAdapters(torch.arange(-1, len(adapters)))
    model = reference_model(checkpoint, adapters, rows, dtype)
    with _inside(dtype):
        start = time.perf_counter()
        logits = model(input_ids=batch, use_cache=False).logits
        seconds = time.perf_counter() - start
        linears.watch(model)
        model(input_ids=batch, use_cache=False)
    return logits, seconds


def _inside(dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context in which a model of a dtype runs."""
    return Float64Inside() if dtype == torch.float64 else nullcontext()
