"""Adapters in plain torch: two products with all adapters stacked, and a mask in between.

y = base + ((x A^T) * mask) B^T, where A ``[adapters * rank, in_features]`` stacks all adapters. The
products read every adapter, whichever adapters the tokens use. x A^T is rounded to the dtype of x.

Source: arXiv:2106.09685; the masking is that of ``int4_lora.compiled.adapters.terms.masked``.
"""

import functools

import torch
from torch.nn.functional import linear

from benchmarks.peers.peer import Adapters


def _refuses(layer):
    return None


def _make(layer):
    stack = layer.stack
    b = stack.b * stack.scaling.to(layer.dtype)[:, None, None]
    owner = torch.arange(stack.adapters, device=layer.device).repeat_interleave(stack.rank)
    mask = (layer.ids[:, None] == owner).to(layer.dtype)  # [tokens, adapters * rank]
    bt = b.transpose(1, 2).flatten(0, 1).contiguous()  # [adapters * rank, out]
    return functools.partial(_add, layer.x, stack.a.flatten(0, 1), mask, bt)


def _add(x, a, mask, bt, base):
    return torch.addmm(base, linear(x, a) * mask, bt)


ADAPTERS = Adapters("LoRA", _refuses, _make)
