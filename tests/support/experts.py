"""Experts whose groups, adapters and routing all differ."""

import torch

from int4_lora.reference import ExpertsLoRA, ExpertsWeight, LoRASlice
from support.weights import narrow, random_stack, random_weight

HIDDEN, INTER = 32, 24


def random_experts(count=4, *, hidden=HIDDEN, inter=INTER, **arguments):
    """Return experts of random weights."""
    return ExpertsWeight(
        gate_up=[
            random_weight(rows=2 * inter, columns=hidden, seed=2 * expert, **arguments)
            for expert in range(count)
        ],
        down=[
            random_weight(rows=hidden, columns=inter, seed=2 * expert + 1, **arguments)
            for expert in range(count)
        ],
    )


def random_experts_lora(count=4, *, hidden=HIDDEN, inter=INTER, rank=4, **arguments):
    """Return adapters of every layer; expert 1 has them on up and gate apart, expert 2 has none."""

    def stack(rows, columns, seed):
        return random_stack(rows=rows, columns=columns, rank=rank, seed=seed, **arguments)

    gate_up = [stack(2 * inter, hidden, 50 + expert) for expert in range(count)]
    down = [stack(hidden, inter, 90 + expert) for expert in range(count)]
    if count > 2:
        up = stack(2 * inter, hidden, 70)
        gate_up[1] = [LoRASlice(narrow(up, inter), inter), LoRASlice(narrow(gate_up[1], inter), 0)]
        gate_up[2] = down[2] = None
    return ExpertsLoRA(gate_up, down)


def random_routing(tokens=7, k=2, count=4, seed=5, dropped=True):
    """Return topk_ids and topk_weights: different experts for a token, some dropped."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, count, generator=generator)
    weights, ids = scores.softmax(dim=1).topk(k)
    if dropped and tokens > 2:
        ids[2, 0] = -1
    return ids, weights
