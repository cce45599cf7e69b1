"""The experts of one token: a product with each chosen expert's weight, and a graph after a layer.

Rows are the token's k choices, in their order. So nothing is sorted or gathered, and the graphs do
the rest: the first adds the adapters of gate and up and applies the activation, the second adds the
adapters of down and sums the weighted results. A graph may leave out roundings to the dtype of x
that ``moe.py`` makes between these steps; ``moe_error_bound(..., steps_rounded=True)`` covers both.

It takes weights whose product with one row is a single call of an operator.

Source: ``int4_lora.reference.int4_moe``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.gradients import needs_gradients
from int4_lora.compiled.graphs.entry import entry_of
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.prepared_experts import PreparedExperts, PreparedExpertsLoRA
from int4_lora.compiled.selection.choice import choose
from int4_lora.reference.lora import accumulation_dtype
from int4_lora.reference.moe import Activation, activated

__all__ = ["one_token", "takes_one_token"]


def takes_one_token(
    x: Tensor, experts: PreparedExperts, topk_weights: Tensor, lora: PreparedExpertsLoRA | None
) -> bool:
    """Return whether ``one_token`` takes a call.

    Args:
        x: ``[tokens, hidden]``.
        experts: returned by ``prepare_experts``.
        topk_weights: ``[tokens, k]``.
        lora: returned by ``prepare_experts_lora``, or None.
    """
    if x.shape[0] != 1 or torch.compiler.is_compiling() or not experts.alike:
        return False
    of_gate_up, of_down = _slices(lora)
    if needs_gradients(x, (*of_gate_up, *of_down), topk_weights):
        return False
    layers = (experts.gate_up[0], experts.down[0])
    return all(choose(weight, x.dtype, 1).one_call for weight in layers)


@torch.no_grad()
def one_token(
    x: Tensor,
    experts: PreparedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: PreparedExpertsLoRA | None,
    adapter_ids: Tensor | None,
    activation: Activation,
) -> Tensor:
    """Return ``int4_moe`` of one token, with the weights applied to the experts' results.

    Args:
        x: ``[1, hidden]``.
        experts: returned by ``prepare_experts``.
        topk_ids: int ``[1, k]``; an id outside ``[0, experts)`` adds nothing.
        topk_weights: ``[1, k]``.
        lora: returned by ``prepare_experts_lora``, or None.
        adapter_ids: int ``[1]``; needed with ``lora``.
        activation: "silu" or "gelu_tanh".
    """
    chosen = topk_ids[0].tolist()
    pairs = (experts.count, 0 if lora is None else lora.adapters)
    adapter_ids = None if lora is None else adapter_ids
    kind = (len(chosen), experts.hidden, experts.inter, *pairs)

    of_gate_up, of_down = _slices(lora)
    y = _products([x] * len(chosen), experts.gate_up, chosen)
    by_token = (y, x, topk_ids, adapter_ids)
    function = functools.partial(_after_gate_up, pairs=pairs, activation=activation)
    name = ("one token, gate and up", activation, *kind)
    h = entry_of(name, function, _inductor, by_token, (), of_gate_up)(*by_token)

    y = _products(h.view(len(chosen), -1).chunk(len(chosen)), experts.down, chosen)
    by_choice = (y, h, topk_ids, topk_weights, adapter_ids)
    function = functools.partial(_after_down, pairs=pairs, dtype=x.dtype)
    return entry_of(("one token, down", *kind), function, _inductor, by_choice, (), of_down)(
        *by_choice
    )


def _inductor(bucket: tuple[int, int]) -> str:
    return "inductor"


def _slices(
    lora: PreparedExpertsLoRA | None,
) -> tuple[Sequence[PreparedSlice], Sequence[PreparedSlice]]:
    """Return the slices of gate and up, and those of down; none where there are no adapters."""
    if lora is None:
        return (), ()
    gate_up, down = lora.gate_up, lora.down
    return () if gate_up is None else gate_up.slices, () if down is None else down.slices


def _products(
    rows: Sequence[Tensor], weights: Sequence[PreparedWeight], chosen: Sequence[int]
) -> Tensor:
    """Return each row times its expert's weight, side by side; 0 where there is no such expert.

    Args:
        rows: k tensors ``[1, in_features]``.
        weights: the weight of each expert.
        chosen: the expert of each row.

    Returns:
        ``[1, k * out_features]``.
    """
    base = choose(weights[0], rows[0].dtype, 1).base
    parts = [
        base(row, weights[expert])
        if 0 <= expert < len(weights)
        else row.new_zeros(1, weights[0].out_features)
        for row, expert in zip(rows, chosen, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _after_gate_up(
    y: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    adapter_ids: Tensor | None,
    slices: Sequence[PreparedSlice],
    *,
    pairs: tuple[int, int],
    activation: Activation,
) -> Tensor:
    """Return ``act(gate) * up`` of each choice, with adapters: ``[1, k * inter]``."""
    k, sums = topk_ids.shape[1], accumulation_dtype(x)
    rows = _with_adapters(y.view(k, -1), x.expand(k, -1), topk_ids, adapter_ids, slices, pairs)
    gate, up = rows.to(sums).chunk(2, dim=1)  # [k, inter] each
    return (activated(gate, activation) * up).to(x.dtype).view(1, -1)


def _after_down(
    y: Tensor,
    h: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    adapter_ids: Tensor | None,
    slices: Sequence[PreparedSlice],
    *,
    pairs: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return the weighted sum of the choices' results, with adapters: ``[1, hidden]``."""
    k, sums = topk_ids.shape[1], accumulation_dtype(h)
    rows = _with_adapters(y.view(k, -1), h.view(k, -1), topk_ids, adapter_ids, slices, pairs)
    used = (topk_ids >= 0) & (topk_ids < pairs[0])
    weighted = topk_weights.to(sums).view(k, 1) * rows.to(sums)
    total = torch.where(used.view(k, 1), weighted, 0).sum(0, keepdim=True)
    return total.to(dtype)


def _with_adapters(
    base: Tensor,
    rows: Tensor,
    topk_ids: Tensor,
    adapter_ids: Tensor | None,
    slices: Sequence[PreparedSlice],
    pairs: tuple[int, int],
) -> Tensor:
    """Add to each choice the adapter of its pair, adapter * experts + expert."""
    if adapter_ids is None or not slices:
        return base
    experts, adapters = pairs
    expert, adapter = topk_ids[0].to(torch.int64), adapter_ids.to(torch.int64)
    known = (expert >= 0) & (expert < experts) & (adapter >= 0) & (adapter < adapters)
    return add_terms(base, rows, slices, torch.where(known, adapter * experts + expert, -1), None)
