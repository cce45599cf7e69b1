"""The adapters' delta of the layer, ``scaling * (x A^T) B^T`` with each token's own A and B.

Three ways to compute the reference's ``expand(shrink(x))``. Compiled, none copies an adapter for a
token; ``grouped`` copies one for each block of tokens.

- ``gathered`` writes out the sums over in_features and over the rank, and indexes A and B by the
  token's adapter. It costs the rank of that adapter and needs no buffer, but leaves the matrix
  units of a GPU idle. It serves few tokens, and on a CPU any number of tokens up to rank 64.
- ``masked`` multiplies by all adapters side by side, one matrix of adapters x rank rows. Between
  the two products it replaces every number of an adapter other than the token's by 0. It costs the
  ranks of all adapters, so it serves few adapters.
- ``grouped`` groups the tokens by adapter and multiplies each block of tokens by its adapter. It
  costs the rank of the token's adapter, so it serves many adapters. It also serves a B with a NaN
  or an infinity: 0 times those is NaN, which ``masked`` would add to other adapters' tokens.

Source: ``int4_lora.reference.lora``; arXiv:2310.18547 for the grouping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.grouping import bring_together
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.products import batched_product, product
from int4_lora.reference.lora import accumulation_dtype

__all__ = [
    "GATHERED_TOKENS",
    "UNROLLED_RANK",
    "add_terms",
    "gathered",
    "grouped",
    "masked",
    "side_by_side",
    "spread",
]

GATHERED_TOKENS = {  # the most tokens to gather: at any rank (a bucket's end), at unrolled ranks
    "cpu": (24, 2**31),
    "cuda": (64, 64),
}
UNROLLED_RANK = 64  # the largest rank over which the sum is written out step by step
MASKED_RANKS = 256  # the most adapters x rank to mask; a single adapter may exceed it
BLOCK_TOKENS = {"cpu": 16, "cuda": 32}  # rows per block; not measured on a GPU


def add_terms(
    base: Tensor,
    x: Tensor,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
    *,
    any_tokens: bool = False,
) -> Tensor:
    """Return ``RN_x(base + deltas + bias)``, summed in the accumulation dtype.

    Args:
        base: ``[tokens, out_features]``, rounded or not.
        x: ``[tokens, in_features]``.
        slices: the adapters, by slice of the outputs.
        adapter_ids: int ``[tokens]``; needed with slices.
        bias: ``[out_features]`` or None.
        any_tokens: whether to use ``gathered`` always, so that the graph is right for any number of
            tokens and any values of the adapters.
    """
    sums = accumulation_dtype(x)
    deltas = []
    if adapter_ids is not None:
        for one in slices:
            term = gathered if any_tokens else _term(x, one)
            deltas.append((one.start, term(x, one, adapter_ids)))
    if not x.is_cuda:
        return side_by_side(base, deltas, bias, sums, x.dtype)
    total = base.to(sums)
    for start, delta in deltas:
        total = total + spread(delta, start, base.shape[1])
    if bias is not None:
        total = total + bias.to(sums)
    return total.to(x.dtype)


def side_by_side(
    base: Tensor,
    deltas: Sequence[tuple[int, Tensor]],
    bias: Tensor | None,
    sums: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``base + deltas + bias`` slice by slice: on a CPU each slice gets loops of its own.

    If deltas were padded to all outputs, each would be computed for the other slices' outputs, too.

    Args:
        base: ``[tokens, out_features]``.
        deltas: the start and the delta of each slice.
        bias: ``[out_features]`` or None.
        sums: the accumulation dtype.
        dtype: the dtype of the result.
    """
    parts = []
    for start, stop, delta in _spans(deltas, base.shape[1]):
        total = base[:, start:stop].to(sums)
        if delta is not None:
            total = total + delta
        if bias is not None:
            total = total + bias[start:stop].to(sums)
        parts.append(total.to(dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _spans(
    deltas: Sequence[tuple[int, Tensor]], outputs: int
) -> Iterator[tuple[int, int, Tensor | None]]:
    """Yield spans that cover all outputs in order: start, stop, and the delta or None."""
    place = 0
    for start, delta in sorted(deltas, key=lambda one: one[0]):
        if start > place:
            yield place, start, None
        place = start + delta.shape[1]
        yield start, place, delta
    if place < outputs or not deltas:
        yield place, outputs, None


def spread(delta: Tensor, start: int, outputs: int) -> Tensor:
    """Return a slice's delta widened to all outputs, 0 outside of the slice.

    Inductor computes a padded tensor inside a mask, where it loads h and the ids once for every
    output; three slices spilled 5 KB of registers. So a column outside of the slice reads a column
    of the slice, and 0 replaces it; columns stay consecutive, so that vector loads read B.
    """
    width = delta.shape[1]
    if width == outputs:
        return delta
    place = torch.arange(outputs, dtype=torch.int32, device=delta.device)
    column = (place + -start % width) % width
    own = (place >= start) & (place < start + width)
    return torch.where(own, delta.index_select(1, column), 0)


def _term(x: Tensor, one: PreparedSlice) -> Callable[[Tensor, PreparedSlice, Tensor], Tensor]:
    """Return the function that computes the delta of a slice."""
    few, most = GATHERED_TOKENS.get(x.device.type, GATHERED_TOKENS["cuda"])
    if x.shape[0] <= (most if one.rank <= UNROLLED_RANK else few):
        return gathered
    narrow = one.adapters == 1 or one.adapters * one.rank <= MASKED_RANKS
    return masked if narrow and one.finite else grouped


def gathered(x: Tensor, one: PreparedSlice, adapter_ids: Tensor) -> Tensor:
    """Return the delta as sums written out: ``[tokens, out]`` in the accumulation dtype."""
    sums = accumulation_dtype(x)
    own = (adapter_ids >= 0) & (adapter_ids < one.adapters)
    index = adapter_ids.clamp(0, one.adapters - 1)
    a, bt = one.a.index_select(0, index), one.bt.index_select(0, index)  # fused, never in memory
    h = (a.to(sums) * x.to(sums).unsqueeze(1)).sum(-1)  # [tokens, rank]
    if one.rank > UNROLLED_RANK:
        delta = (h.unsqueeze(2) * bt.to(sums)).sum(1)
    else:
        delta = h[:, 0:1] * bt[:, 0].to(sums)
        for step in range(1, one.rank):
            delta = delta + h[:, step : step + 1] * bt[:, step].to(sums)
    delta = delta * one.scaling.to(sums).index_select(0, index).unsqueeze(1)
    return torch.where(own.unsqueeze(1), delta, 0)  # last: a clamped id's adapter may hold NaN


def masked(x: Tensor, one: PreparedSlice, adapter_ids: Tensor) -> Tensor:
    """Return the delta as two products with all adapters side by side: ``[tokens, out]``.

    The scaling comes last, as in the reference. That also keeps Inductor from fusing the second
    product and the sum with the base into an ``addmm``, which copies the base first.
    """
    sums = accumulation_dtype(x)
    h = product(x, one.a.flatten(0, 1).T, sums)  # [tokens, adapters * rank]
    owner = torch.arange(one.adapters, device=x.device).repeat_interleave(one.rank)
    h = torch.where(adapter_ids.unsqueeze(1) == owner, h, 0)  # all 0 for an id of no adapter
    own = (adapter_ids >= 0) & (adapter_ids < one.adapters)
    scaling = one.scaling.to(sums).index_select(0, adapter_ids.clamp(0, one.adapters - 1))
    delta = h @ one.bt.to(sums).flatten(0, 1)
    return delta * torch.where(own, scaling, 0).unsqueeze(1)


def grouped(x: Tensor, one: PreparedSlice, adapter_ids: Tensor) -> Tensor:
    """Return the delta as one product for each block of tokens, with its adapter's A and B."""
    sums = accumulation_dtype(x)
    size = BLOCK_TOKENS.get(x.device.type, BLOCK_TOKENS["cuda"])
    blocks = bring_together(adapter_ids, one.adapters, size)
    a, bt = one.a.index_select(0, blocks.adapter), one.bt.index_select(0, blocks.adapter)
    h = batched_product(blocks.gather(x), a.transpose(1, 2), sums)  # [blocks, size, rank]
    scaling = one.scaling.to(sums).index_select(0, blocks.adapter)
    return blocks.scatter(h @ bt.to(sums) * scaling[:, None, None])
