"""The adapters' term of the layer, ``scaling * (x A^T) B^T`` with each token's own A and B.

Two identities of the reference's ``expand(shrink(x))``, neither of which copies an adapter for a
token when compiled:

- ``gathered``: the sums over in_features and over the rank are written out, with the token's
  adapter as an index into A and B. Few tokens.
- ``masked``: all adapters side by side are one matrix of adapters x rank rows; between the two
  products every number that belongs to another adapter than the token's is replaced by 0. Many
  tokens; costs the rank of all adapters, not of the token's. Where a B holds a NaN or an infinity,
  0 times it would reach other adapters' tokens: then the reference's own loop is used.

Source: ``int4_lora.reference.lora``; arXiv:2310.18547.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from int4_lora.compiled.prepared_lora import PreparedSlice
from int4_lora.compiled.products import product
from int4_lora.reference import expand, shrink
from int4_lora.reference.lora import accumulation_dtype

__all__ = [
    "GATHERED_TOKENS",
    "UNROLLED_RANK",
    "add_terms",
    "apart",
    "gathered",
    "masked",
]

GATHERED_TOKENS = {"cpu": 16, "cuda": 64}  # up to which gathering is used
UNROLLED_RANK = 64  # the most steps of the sum over the rank that are written out


def add_terms(
    base: Tensor,
    x: Tensor,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return ``RN_x(base + deltas + bias)``, summed in the dtype of sums.

    Args:
        base: ``[tokens, out_features]``, rounded or not.
        x: ``[tokens, in_features]``.
        slices: the adapters, by slice of the outputs.
        adapter_ids: int ``[tokens]``; needed with slices.
        bias: ``[out_features]`` or None.
    """
    total = base.to(accumulation_dtype(x))
    if adapter_ids is not None:
        for one in slices:
            delta = _term(x, one)(x, one, adapter_ids)
            total = total + pad(delta, (one.start, base.shape[1] - one.stop))
    if bias is not None:
        total = total + bias.to(total.dtype)
    return total.to(x.dtype)


def _term(x: Tensor, one: PreparedSlice) -> Callable[[Tensor, PreparedSlice, Tensor], Tensor]:
    """Return the identity to use."""
    most = GATHERED_TOKENS.get(x.device.type, GATHERED_TOKENS["cuda"])
    if x.shape[0] <= most and one.rank <= UNROLLED_RANK:
        return gathered
    return masked if one.finite else apart


def gathered(x: Tensor, one: PreparedSlice, adapter_ids: Tensor) -> Tensor:
    """Return the term as sums written out: ``[tokens, out]`` in the dtype of sums."""
    sums = accumulation_dtype(x)
    own = (adapter_ids >= 0) & (adapter_ids < one.adapters)
    index = adapter_ids.clamp(0, one.adapters - 1)
    a, bt = one.a.index_select(0, index), one.bt.index_select(0, index)  # fused, never in memory
    h = (a.to(sums) * x.to(sums).unsqueeze(1)).sum(-1)  # [tokens, rank]
    h = h * one.scaling.to(sums).index_select(0, index).unsqueeze(1)
    h = torch.where(own.unsqueeze(1), h, 0)
    delta = h[:, 0:1] * bt[:, 0].to(sums)
    for step in range(1, one.rank):
        delta = delta + h[:, step : step + 1] * bt[:, step].to(sums)
    return delta if one.finite else torch.where(own.unsqueeze(1), delta, 0)


def masked(x: Tensor, one: PreparedSlice, adapter_ids: Tensor) -> Tensor:
    """Return the term as two products with all adapters side by side: ``[tokens, out]``."""
    sums = accumulation_dtype(x)
    h = product(x, one.a.flatten(0, 1).T, sums)  # [tokens, adapters * rank]
    owner = torch.arange(one.adapters, device=x.device).repeat_interleave(one.rank)
    own = adapter_ids.unsqueeze(1) == owner  # false everywhere for an id of no adapter
    h = torch.where(own, h * one.scaling.to(sums).repeat_interleave(one.rank), 0)
    return h @ one.bt.to(sums).flatten(0, 1)


def apart(x: Tensor, one: PreparedSlice, adapter_ids: Tensor) -> Tensor:
    """Return the term as the reference defines it, one adapter after the other."""
    stack = one.lora_slice().stack
    return expand(shrink(x, stack, adapter_ids), stack, adapter_ids)
