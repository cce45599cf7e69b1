"""Each kind of layer checked against the reference before it serves a request.

A layer is run as it will serve, on random x and random adapters. Some of its outputs go to
``check_linear`` or ``check_addition``, which judge every result of the project.

Source: ``docs/conformance.md``, "The verdict".
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from int4_lora.compiled import (
    PreparedExperts,
    PreparedExpertsLoRA,
    PreparedLoRA,
    PreparedWeight,
    add_lora,
    formulation_for,
    int4_lora_linear,
    int4_moe,
)
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.reference import ExpertsWeight, LoRASlice
from int4_lora.reference.conformance import check_addition, check_experts, check_linear
from int4_lora.reference.conformance.judging.verdict import RMS_ELEMENTS
from int4_lora.reference.float4_weight import BaseWeight
from int4_lora.reference.lora_stack import rows_of
from int4_lora.reference.moe import Activation

__all__ = [
    "fault_of_addition",
    "fault_of_experts",
    "fault_of_layer",
    "graph_key_of_layer",
    "tokens_of_each_graph",
]

BLOCK, BLOCKS = 8, 32  # outputs that share words of zero-points, and how many blocks are judged


def tokens_of_each_graph(max_tokens: int, graph_key: Callable[[int], Hashable]) -> list[int]:
    """Return one number of tokens for each graph that serves up to ``max_tokens``.

    Args:
        max_tokens: the most tokens in one call.
        graph_key: the key of the graph at a number of tokens.

    Example:
        >>> tokens_of_each_graph(40, lambda tokens: tokens > 8)
        [2, 10]
    """
    by_graph: dict[Hashable, list[int]] = {}
    for tokens in range(1, max_tokens + 1):
        by_graph.setdefault(graph_key(tokens), []).append(tokens)
    # the second of each: the first may be a multiple of a block, which hides faults at the edge
    return [counts[:2][-1] for counts in by_graph.values()]


def graph_key_of_layer(
    weight: PreparedWeight, dtype: torch.dtype, tokens: int, lora: PreparedLoRA | None = None
) -> Hashable:
    """Return the part of a layer's graph key that depends on the number of tokens."""
    formulation = formulation_for(weight, dtype, tokens, lora)
    return formulation.name, bucket_of(tokens, weight.device.type)


@torch.inference_mode()
def fault_of_layer(
    packed: BaseWeight,
    weight: PreparedWeight,
    dtype: torch.dtype,
    tokens: int,
    lora: PreparedLoRA | None = None,
    bias: Tensor | None = None,
) -> str | None:
    """Return what is wrong with a layer at a number of tokens, or None.

    Args:
        packed: the checkpoint's tensors.
        weight: the same, laid out.
        dtype: of x.
        tokens: rows of x in one call.
        lora: slots of the shapes that will serve; random adapters of these shapes are used.
        bias: ``[out_features]`` or None.
    """
    generator = torch.Generator().manual_seed(tokens)
    outputs = _sampled_outputs(packed.out_features, generator).to(weight.device)
    adapters = None if lora is None else _random_adapters(lora, generator)
    results, xs, ids = [], [], []
    for _ in range(_calls(tokens, outputs)):
        x = torch.randn(tokens, packed.in_features, generator=generator).to(weight.device, dtype)
        adapter_ids = None if adapters is None else _random_ids(adapters, tokens, generator)
        results.append(int4_lora_linear(x, weight, adapters, adapter_ids, bias))
        xs.append(x)
        ids += [] if adapter_ids is None else [adapter_ids]
    y, x = torch.cat(results), torch.cat(xs)
    if y.shape != (len(x), packed.out_features):
        return f"returned {list(y.shape)}, not {[len(x), packed.out_features]}"
    slices = [] if adapters is None else _slices_of(adapters, outputs)
    formulation = formulation_for(weight, dtype, tokens, adapters)
    finding = check_linear(
        y[:, outputs],
        x,
        packed.rows(outputs),
        slices or None,
        torch.cat(ids) if slices else None,
        None if bias is None else bias[outputs],
        weight_rounded=formulation.weight_rounded,
        base_rounded=formulation.base_rounded,
    )
    return None if finding is None else finding.message


@torch.inference_mode()
def fault_of_addition(
    lora: PreparedLoRA, out_features: int, dtype: torch.dtype, tokens: int
) -> str | None:
    """Return what is wrong with adding adapters to a base of ``out_features``, or None."""
    generator = torch.Generator().manual_seed(tokens)
    device, in_features = lora.slices[0].a.device, lora.slices[0].a.shape[2]
    outputs = _sampled_outputs(out_features, generator).to(device)
    adapters = _random_adapters(lora, generator)
    results, bases, xs, ids = [], [], [], []
    for _ in range(_calls(tokens, outputs)):
        xs.append(torch.randn(tokens, in_features, generator=generator).to(device, dtype))
        bases.append(torch.randn(tokens, out_features, generator=generator).to(device, dtype))
        ids.append(_random_ids(adapters, tokens, generator))
        results.append(add_lora(bases[-1], xs[-1], adapters, ids[-1]))
    y, base = torch.cat(results), torch.cat(bases)
    if y.shape != base.shape:
        return f"returned {list(y.shape)}, not {list(base.shape)}"
    slices = _slices_of(adapters, outputs)
    finding = check_addition(y[:, outputs], base[:, outputs], torch.cat(xs), slices, torch.cat(ids))
    return None if finding is None else finding.message


@torch.inference_mode()
def fault_of_experts(
    weight: PreparedExperts,
    dtype: torch.dtype,
    tokens: int,
    top_k: int,
    activation: Activation,
    lora: PreparedExpertsLoRA | None = None,
) -> str | None:
    """Return what is wrong with experts at a number of tokens, or None.

    Args:
        weight: the experts, whose layouts give the checkpoint's bits back.
        dtype: of x.
        tokens: rows of x in one call.
        top_k: how many experts a token has.
        activation: between gate_up and down.
        lora: slots of the shapes that will serve; random adapters of these shapes are used.
    """
    generator = torch.Generator().manual_seed(tokens)
    adapters = None if lora is None else _random_experts_adapters(lora, generator)
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    ids_of_calls: list[Tensor] = []
    for _ in range(-(-RMS_ELEMENTS // (tokens * weight.hidden))):
        x = torch.randn(tokens, weight.hidden, generator=generator).to(dtype)
        ids = torch.rand(tokens, weight.count, generator=generator).argsort(dim=1)[:, :top_k]
        p = torch.rand(tokens, top_k, generator=generator)
        adapter_ids = None
        if adapters is not None:
            adapter_ids = torch.randint(-1, adapters.adapters, (tokens,), generator=generator)
            ids_of_calls.append(adapter_ids)
        y = int4_moe(x, weight, ids, p, adapters, adapter_ids, activation=activation)
        calls.append((y, x, ids, p))
    y, x, ids, p = (torch.cat(tensors) for tensors in zip(*calls, strict=True))
    finding = check_experts(
        y,
        x,
        _experts_of(weight, ids),
        ids,
        p,
        None if adapters is None else adapters.experts_lora(),
        torch.cat(ids_of_calls) if ids_of_calls else None,
        activation=activation,
        weight_rounded=False,
        steps_rounded=True,
    )
    return None if finding is None else finding.message


def _experts_of(weight: PreparedExperts, ids: Tensor) -> ExpertsWeight:
    """Return the checkpoint's tensors of the experts that ids name; others are not read."""
    used = sorted(set(ids.flatten().tolist()))
    layers = {
        name: {expert: getattr(weight, name)[expert].packed_weight() for expert in used}
        for name in ("gate_up", "down")
    }
    return ExpertsWeight(
        *(
            [layer.get(expert, layer[used[0]]) for expert in range(weight.count)]
            for layer in layers.values()
        )
    )


def _random_experts_adapters(
    lora: PreparedExpertsLoRA, generator: torch.Generator
) -> PreparedExpertsLoRA:
    """Return random adapters in the shapes and strides of the slots of experts."""
    gate_up, down = (
        None if layer is None else _random_adapters(layer, generator)
        for layer in (lora.gate_up, lora.down)
    )
    return PreparedExpertsLoRA(gate_up, down, lora.adapters, lora.experts)


def _calls(tokens: int, outputs: Tensor) -> int:
    """Return how many calls give the judge the elements that its rule of the rms error needs."""
    return -(-RMS_ELEMENTS // (tokens * len(outputs)))


def _sampled_outputs(out_features: int, generator: torch.Generator) -> Tensor:
    """Return some outputs, ascending: whole blocks, the first and the last among them."""
    blocks = -(-out_features // BLOCK)
    chosen = {0, blocks - 1, *torch.randperm(blocks, generator=generator)[:BLOCKS].tolist()}
    starts = BLOCK * torch.tensor(sorted(chosen))
    outputs = (starts[:, None] + torch.arange(BLOCK)).flatten()
    return outputs[outputs < out_features]


def _slices_of(adapters: PreparedLoRA, outputs: Tensor) -> list[LoRASlice]:
    """Return what the adapters write to some outputs."""
    return rows_of([slice_.lora_slice() for slice_ in adapters.slices], outputs)


def _random_adapters(lora: PreparedLoRA, generator: torch.Generator) -> PreparedLoRA:
    """Return random adapters in the shapes and strides of given slots."""
    with torch.inference_mode(False):  # as the slots themselves are made
        slices = []
        for slot in lora.slices:
            a, bt = _random_like(slot.a, generator), _random_like(slot.bt, generator)
            a /= a.shape[2] ** 0.5
            slices.append(PreparedSlice(a, bt, torch.ones_like(slot.scaling), slot.start))
        return PreparedLoRA(tuple(slices))


def _random_like(slots: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random tensor of the same strides; NaN lies between its elements."""
    last = sum((size - 1) * step for size, step in zip(slots.shape, slots.stride(), strict=True))
    room = slots.new_full((last + 1,), torch.nan).as_strided(slots.shape, slots.stride())
    return room.copy_(torch.randn(slots.shape, generator=generator))


def _random_ids(lora: PreparedLoRA, tokens: int, generator: torch.Generator) -> Tensor:
    """Return an id for each token: any slot, or -1."""
    with torch.inference_mode(False):
        ids = torch.randint(-1, lora.adapters, (tokens,), generator=generator)
        return ids.to(lora.slices[0].a.device)
