"""Layers of experts to measure: their INT4 weights, adapters, dense twins and routing.

Source: ``config.json`` of Qwen3-30B-A3B for the default sizes; ``Qwen3MoeExperts`` of transformers
5 for the dense experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from int4_lora.compiled import int4_moe, prepare_experts, prepare_experts_lora
from int4_lora.reference import (
    ExpertsLoRA,
    ExpertsWeight,
    LoRAStack,
    PackedWeight,
    dequantize,
)
from int4_lora.reference.conformance import Manifest
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import answer
from int4_lora.reference.conformance.judging.verdict import judge
from int4_lora.reference.conformance.judging.yardstick import yardstick_rms

__all__ = ["ExpertLayer", "Sizes", "dense_experts", "routing", "wrong_numbers"]

JUDGED_TOKENS = 2
ROUNDINGS = Manifest(weight_rounded=False, steps_rounded=True)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one layer.

    Args:
        hidden: the width of x.
        inter: the width between up and down.
        experts: the number of experts.
        chosen: the experts of a token.
        group_size: columns that share a scale.
        adapters: the number of adapters.
        rank: their rank.
    """

    hidden: int
    inter: int
    experts: int
    chosen: int
    group_size: int
    adapters: int
    rank: int


class ExpertLayer:
    """One layer's experts with random weights: packed, prepared and dense, and its adapters.

    Args:
        sizes: the sizes.
        seed: of the weights.
    """

    def __init__(self, sizes, seed):
        self.sizes = sizes
        generator = torch.Generator().manual_seed(seed)
        experts, hidden, inter = sizes.experts, sizes.hidden, sizes.inter
        self.packed = ExpertsWeight(
            [_weight(2 * inter, hidden, sizes, generator) for _ in range(experts)],
            [_weight(hidden, inter, sizes, generator) for _ in range(experts)],
        )
        self.prepared = prepare_experts(self.packed)
        self.dense = tuple(
            torch.stack([dequantize(weight) for weight in getattr(self.packed, name)])
            for name in ("gate_up", "down")
        )
        self.lora = ExpertsLoRA(
            [_adapters(2 * inter, hidden, sizes, generator) for _ in range(experts)],
            [_adapters(hidden, inter, sizes, generator) for _ in range(experts)],
        )
        self.prepared_lora = prepare_experts_lora(self.lora)

    def ours(self, x, ids, p, adapter_ids):
        """Return our experts without adapters."""
        return int4_moe(x, self.prepared, ids, p)

    def ours_with_lora(self, x, ids, p, adapter_ids):
        """Return our experts with an adapter for each token."""
        return int4_moe(x, self.prepared, ids, p, self.prepared_lora, adapter_ids)

    def dense_eager(self, x, ids, p, adapter_ids):
        """Return the dense experts without adapters."""
        return dense_experts(x, *self.dense, ids, p)

    def bytes_read(self, ids, adapter_ids=None):
        """Return the least bytes that a call reads of the weights, and of the adapters if given.

        Args:
            ids: ``[tokens, chosen]``.
            adapter_ids: ``[tokens]``, or None.
        """
        sizes = self.sizes
        used = ids.unique().tolist()
        weights = sum(
            getattr(self.packed, name)[expert].nbytes
            for name in ("gate_up", "down")
            for expert in used
        )
        if adapter_ids is None:
            return weights
        pairs = (ids + adapter_ids.unsqueeze(1) * sizes.experts).unique().numel()
        elements = 2 * sizes.hidden + 3 * sizes.inter  # of A and B of both, for each rank
        return weights + pairs * sizes.rank * elements * torch.bfloat16.itemsize

    def dense_bytes_read(self, ids):
        """Return the least bytes that the dense experts read."""
        return ids.unique().numel() * sum(weight[0].nbytes for weight in self.dense)


def dense_experts(x, gate_up, down, ids, p):
    """Return dense experts, computed as transformers computes them eagerly.

    Args:
        x: ``[tokens, hidden]``.
        gate_up: ``[experts, 2 * inter, hidden]``.
        down: ``[experts, hidden, inter]``.
        ids: ``[tokens, chosen]``.
        p: ``[tokens, chosen]``.
    """
    total = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(x[tokens], gate_up[expert]).chunk(2, dim=-1)
        h = functional.silu(gate) * up
        y = functional.linear(h, down[expert]) * p[tokens, places, None]
        total.index_add_(0, tokens, y.to(total.dtype))
    return total


def routing(sizes, tokens, seed):
    """Return x, topk_ids, topk_weights and adapter ids of a batch: every expert equally likely.

    Args:
        sizes: the sizes of the layer.
        tokens: rows of x.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, sizes.hidden, generator=generator).to(torch.bfloat16)
    scores = torch.rand(tokens, sizes.experts, generator=generator)
    p, ids = scores.topk(sizes.chosen)
    adapter_ids = torch.arange(tokens) % sizes.adapters
    return x, ids, p / p.sum(1, keepdim=True), adapter_ids


def wrong_numbers(layer, y, x, ids, p, adapter_ids) -> str | None:
    """Return why some tokens' results are wrong, as the conformance suite judges, or None.

    Args:
        layer: the layer.
        y: ``[tokens, hidden]``.
        x: ``[tokens, hidden]``.
        ids: ``[tokens, chosen]``.
        p: ``[tokens, chosen]``.
        adapter_ids: ``[tokens]``; None without adapters.
    """
    few = slice(0, JUDGED_TOKENS)
    operands = Operands(
        x=x[few],
        experts=layer.packed,
        topk_ids=ids[few],
        topk_weights=p[few],
        experts_lora=None if adapter_ids is None else layer.lora,
        adapter_ids=None if adapter_ids is None else adapter_ids[few],
    )
    held = answer("int4_moe", operands, ROUNDINGS)
    limit = yardstick_rms("int4_moe", operands, ROUNDINGS, held)
    finding = judge(y[few].contiguous(), held, equal=False, yardstick=limit)
    return None if finding is None else f"wrong numbers: {finding.message}"


def _weight(rows, columns, sizes, generator) -> PackedWeight:
    """Return a random symmetric weight whose outputs have about the size of its inputs."""
    packed = torch.randint(
        -(2**31), 2**31, (rows, columns // 8), generator=generator, dtype=torch.int64
    ).to(torch.int32)
    groups = columns // sizes.group_size
    scale = 0.5 + torch.rand(rows, groups, generator=generator)
    scale = (scale / (4.6 * columns**0.5)).to(torch.bfloat16)  # 4.6: the size of random codes
    return PackedWeight(packed, scale, (rows, columns))


def _adapters(rows, columns, sizes, generator) -> LoRAStack:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    a = numbers(sizes.adapters, sizes.rank, columns) / columns**0.5
    b = numbers(sizes.adapters, rows, sizes.rank) / 8
    return LoRAStack(a, b, torch.ones(sizes.adapters))
