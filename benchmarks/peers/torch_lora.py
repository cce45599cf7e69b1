"""Adapters in plain torch: all side by side in two products, other adapters' numbers masked.

y = base + ((x A^T) * own) B^T with A of all adapters ``[adapters * rank, in_features]``. Reads
every adapter, whichever the tokens use. Rounds x A^T to the dtype of x, as the products do.

Source: arXiv:2106.09685; the masking is that of ``int4_lora.compiled.adapters.terms.masked``.
"""

import functools

import torch
from torch.nn.functional import linear

from benchmarks import operands
from benchmarks.peers.peer import Adapters


def _refuses(layer):
    return None


def _make(layer):
    stack = layer.stack
    b = stack.b * stack.scaling.to(layer.dtype)[:, None, None]
    owner = torch.arange(stack.adapters, device=layer.device).repeat_interleave(operands.RANK)
    own = (layer.ids[:, None] == owner).to(layer.dtype)  # [tokens, adapters * rank]
    bt = b.transpose(1, 2).flatten(0, 1).contiguous()  # [adapters * rank, out]
    return functools.partial(_add, layer.x, stack.a.flatten(0, 1), own, bt)


def _add(x, a, own, bt, base):
    return torch.addmm(base, linear(x, a) * own, bt)


ADAPTERS = Adapters("LoRA", _refuses, _make)
