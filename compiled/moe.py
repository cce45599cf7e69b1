"""The compiled experts: the same function as the reference's, on prepared operands.

y = RN_x( sum_j  p_j * down( act(gate(x)) * up(x) ) )

Each pair of a token and an expert is a row, and rows are brought together once, by expert and
adapter. For each used expert, ``gate_up`` and then ``down`` multiply its rows with its weight: few
rows as few tokens of a linear layer, many by tiles. Unused experts are not read, and no more than a
block of a weight's rows is ever dense. The adapters of all rows are added at once.

Each step's result is rounded to the dtype of x: ``steps_rounded=True``. A weight may be rounded or
not, by its number of rows: ``weight_rounded=False``.

It is written for CPUs. It reads the expert ids, and so waits for a GPU, and it breaks the graph of
another ``torch.compile``.

Source: ``int4_lora.reference.int4_moe``; ``moe_align_block_size`` of vLLM for the grouping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.compiled.adapters.addition import add_lora
from int4_lora.compiled.adapters.prepared import PreparedLoRA
from int4_lora.compiled.adapters.runs import add_in_runs
from int4_lora.compiled.gradients import needs_gradients
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.linear import int4_linear
from int4_lora.compiled.one_token_experts import one_token, takes_one_token
from int4_lora.compiled.prepared_experts import PreparedExperts, PreparedExpertsLoRA
from int4_lora.compiled.selection.choice import choose
from int4_lora.reference.checks import (
    ID_DTYPES,
    X_DTYPES,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.lora import accumulation_dtype, check_accumulates, without_autocast
from int4_lora.reference.moe import Activation, activated, check_options, check_top_k

__all__ = ["Rows", "bring_rows_together", "int4_moe"]


def int4_moe(
    x: Tensor,
    experts: PreparedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: PreparedExpertsLoRA | None = None,
    adapter_ids: Tensor | None = None,
    *,
    activation: Activation = "silu",
    weights_first: bool = False,
) -> Tensor:
    """Apply each token's experts, with its adapter, and sum their results.

    Differentiable in x, topk_weights and the adapters.

    Args:
        x: ``[tokens, hidden]``, float16, bfloat16, float32 or float64; tokens may be 0.
        experts: returned by ``prepare_experts``.
        topk_ids: int32 or int64 ``[tokens, k]``; an id outside ``[0, experts)`` adds nothing.
        topk_weights: ``[tokens, k]``, float.
        lora: returned by ``prepare_experts_lora``, or None.
        adapter_ids: int32 or int64 ``[tokens]``; an id outside ``[0, adapters)`` means no adapter.
            Needed with ``lora``.
        activation: "silu" or "gelu_tanh".
        weights_first: whether topk_weights multiply x instead of the results.

    Returns:
        ``[tokens, hidden]`` in the dtype of x, within the bound of
        ``moe_error_bound(..., weight_rounded=False, steps_rounded=True)``.

    Raises:
        TypeError: an operand has the wrong type or dtype.
        ValueError: an operand has the wrong shape or device.

    Example:
        >>> from int4_lora.compiled import prepare_experts
        >>> from int4_lora.reference import ExpertsWeight, quantize
        >>> gate_up, down = (quantize(torch.ones(shape)) for shape in ((256, 128), (128, 128)))
        >>> experts = prepare_experts(ExpertsWeight([gate_up] * 2, [down] * 2))
        >>> int4_moe(torch.ones(1, 128), experts, torch.tensor([[1]]), torch.ones(1, 1)).shape
        torch.Size([1, 128])

    Source:
        ``int4_lora.reference.int4_moe``.
    """
    _check(x, experts, topk_ids, topk_weights, lora, adapter_ids)
    check_options(activation, weights_first)
    with without_autocast(x):
        if not weights_first and takes_one_token(x, experts, topk_weights, lora):
            return one_token(x, experts, topk_ids, topk_weights, lora, adapter_ids, activation)
        return _forward(
            x, experts, topk_ids, topk_weights, lora, adapter_ids, activation, weights_first
        )


def _forward(
    x: Tensor,
    experts: PreparedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: PreparedExpertsLoRA | None,
    adapter_ids: Tensor | None,
    activation: Activation,
    weights_first: bool,
) -> Tensor:
    sums = accumulation_dtype(x)
    adapters = 0 if lora is None else lora.adapters
    rows = bring_rows_together(topk_ids, adapter_ids, experts.count, adapters)
    total = torch.zeros(x.shape[0], experts.hidden, dtype=sums, device=x.device)
    if not rows.spans:
        return total.to(x.dtype)
    chosen = x.index_select(0, rows.tokens)  # [rows, hidden]
    p = topk_weights.flatten().index_select(0, rows.places).to(sums).unsqueeze(1)
    if weights_first:
        chosen = (p * chosen.to(sums)).to(x.dtype)
    of_gate_up, of_down = (None, None) if lora is None else (lora.gate_up, lora.down)
    y = _layer(chosen, experts.gate_up, of_gate_up, rows)
    gate, up = y.to(sums).chunk(2, dim=1)  # [rows, inter] each
    h = (activated(gate, activation) * up).to(x.dtype)
    y = _layer(h, experts.down, of_down, rows).to(sums)
    return total.index_add(0, rows.tokens, y if weights_first else p * y).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Rows:
    """The pairs of tokens and experts, brought together by expert and adapter.

    Args:
        tokens: int64 ``[rows]``, the token of each row.
        places: int64 ``[rows]``, where a row's pair is in the flattened ``topk_ids``.
        pairs: int64 ``[rows]``, adapter * experts + expert; -1 for a token without an adapter.
        spans: (expert, first row, row after the last) of each used expert, in order.
    """

    tokens: Tensor
    places: Tensor
    pairs: Tensor
    spans: Sequence[tuple[int, int, int]]


def bring_rows_together(
    topk_ids: Tensor, adapter_ids: Tensor | None, experts: int, adapters: int
) -> Rows:
    """Return the rows of a batch, those of an expert together and within it those of an adapter.

    Args:
        topk_ids: int ``[tokens, k]``; ids outside ``[0, experts)`` get no row.
        adapter_ids: int ``[tokens]``, or None; ids outside ``[0, adapters)`` mean no adapter.
        experts: the number of experts.
        adapters: the number of adapters.

    Example:
        >>> rows = bring_rows_together(
        ...     torch.tensor([[2, 0], [0, -1]]), torch.tensor([1, 0]), experts=3, adapters=2
        ... )
        >>> rows.tokens.tolist(), rows.places.tolist(), rows.pairs.tolist(), rows.spans
        ([1, 0, 0], [2, 1, 0], [0, 3, 5], [(0, 0, 2), (2, 2, 3)])
    """
    k, flat = topk_ids.shape[1], topk_ids.flatten().to(torch.int64)
    adapter = torch.full_like(flat, -1)
    if adapter_ids is not None:
        adapter = adapter_ids.to(torch.int64).repeat_interleave(k)
        adapter = torch.where((adapter >= 0) & (adapter < adapters), adapter, -1)
    used = (flat >= 0) & (flat < experts)
    key = torch.where(used, flat, experts) * (adapters + 1) + adapter + 1
    counts = torch.bincount(torch.where(used, flat, experts), minlength=experts + 1).tolist()
    places = key.argsort(stable=True)[: sum(counts[:experts])]
    of_rows = adapter.index_select(0, places)
    pairs = of_rows * experts + flat.index_select(0, places)
    spans, start = [], 0
    for expert, count in enumerate(counts[:experts]):
        if count:
            spans.append((expert, start, start + count))
            start += count
    return Rows(places // k, places, torch.where(of_rows >= 0, pairs, -1), spans)


def _layer(
    x: Tensor, weights: Sequence[PreparedWeight], lora: PreparedLoRA | None, rows: Rows
) -> Tensor:
    """Return a layer of the experts: ``[rows, out_features]`` in the dtype of x."""
    parts = [_product(x[start:stop], weights[expert]) for expert, start, stop in rows.spans]
    base = parts[0] if len(parts) == 1 else torch.cat(parts)
    if lora is None:
        return base
    if needs_gradients(x, lora.slices, base):
        return add_in_runs(base, x, lora.slices, rows.pairs)
    return add_lora(base, x, lora, rows.pairs)


def _product(x: Tensor, weight: PreparedWeight) -> Tensor:
    """Return ``x W^T`` in the dtype of x."""
    formulation = choose(weight, x.dtype, x.shape[0])
    if formulation.one_call and not (torch.is_grad_enabled() and x.requires_grad):
        return formulation.base(x, weight)  # without the checks, which cost as much as one row
    return int4_linear(x, weight)


def _check(
    x: Tensor,
    experts: PreparedExperts,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: PreparedExpertsLoRA | None,
    adapter_ids: Tensor | None,
) -> None:
    if not isinstance(experts, PreparedExperts):
        got = type(experts).__name__
        raise TypeError(f"experts must be PreparedExperts, got {got}: call prepare_experts()")
    check_dtype("x", x, X_DTYPES)
    check_shape("x", x, (None, experts.hidden), "[tokens, hidden]")
    check_dtype("topk_ids", topk_ids, ID_DTYPES)
    check_shape("topk_ids", topk_ids, (x.shape[0], None), "[tokens, k]")
    check_top_k(topk_ids, experts.count)
    check_dtype("topk_weights", topk_weights, X_DTYPES)
    check_shape("topk_weights", topk_weights, topk_ids.shape, "[tokens, k]")
    check_accumulates("topk_weights", topk_weights, x)
    check_one_device(x=x, topk_ids=topk_ids, topk_weights=topk_weights, adapter_ids=adapter_ids)
    if experts.device != x.device:
        raise ValueError(
            f"all operands must be on one device: x is on {x.device}, experts on {experts.device}"
        )
    if adapter_ids is not None:
        check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
        check_shape("adapter_ids", adapter_ids, (x.shape[0],), "[tokens]")
    if lora is None:
        return
    if not isinstance(lora, PreparedExpertsLoRA):
        got = type(lora).__name__
        raise TypeError(f"lora must be PreparedExpertsLoRA, got {got}: call prepare_experts_lora()")
    if lora.experts != experts.count:
        raise ValueError(f"lora must be for {experts.count} experts, got {lora.experts}")
    if adapter_ids is None:
        raise ValueError("adapter_ids must be given with lora, got None")
