"""Group tokens by adapter, in blocks of rows that use one adapter each.

Each token with an adapter gets a row in that adapter's blocks of ``size`` rows; padding rows fill
the last block of an adapter. The number of blocks needed depends on the values of the ids, and
reading those would break the graph. So the most that could be needed are always laid out:
``min(tokens, ceil(tokens / size) + adapters)``.

Source: ``moe_align_block_size`` of vLLM groups tokens by expert in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenBlocks", "bring_together"]


@dataclass(frozen=True)
class TokenBlocks:
    """The row of each token, and the adapter of each block.

    Args:
        own: bool ``[tokens]``, whether a token has an adapter.
        place: int64 ``[tokens]``, the row of each token; 0 for a token without an adapter.
        token: int64 ``[blocks * size]``, the token of each row; ``tokens`` for a padding row.
        adapter: int64 ``[blocks]``, the adapter of each block.
        size: rows per block.
    """

    own: Tensor
    place: Tensor
    token: Tensor
    adapter: Tensor
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of ``x`` ``[tokens, n]`` as ``[blocks, size, n]``; padding rows are 0."""
        rows = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, self.token)
        return rows.view(self.adapter.shape[0], self.size, x.shape[1])  # -1 adds a division

    def scatter(self, rows: Tensor) -> Tensor:
        """Return ``[blocks, size, n]`` as ``[tokens, n]``; 0 for tokens without an adapter."""
        # two indices, since torch 2.8 cannot reason about the size of one flat dimension
        found = rows[self.place // self.size, self.place % self.size]
        return torch.where(self.own.unsqueeze(1), found, 0)


def bring_together(adapter_ids: Tensor, adapters: int, size: int) -> TokenBlocks:
    """Assign tokens to blocks of one adapter each.

    Args:
        adapter_ids: int32 or int64 ``[tokens]``; an id outside ``[0, adapters)`` means none.
        adapters: the number of adapters.
        size: rows per block.

    Example:
        >>> blocks = bring_together(torch.tensor([1, -1, 0, 1, 1]), adapters=2, size=2)
        >>> blocks.token.tolist(), blocks.adapter.tolist()
        ([2, 5, 0, 3, 4, 5, 5, 5, 5, 5], [0, 1, 1, 1, 1])
    """
    tokens, device = adapter_ids.shape[0], adapter_ids.device
    own = (adapter_ids >= 0) & (adapter_ids < adapters)
    theirs = adapter_ids.unsqueeze(1) == torch.arange(adapters, device=device)
    counted = theirs.to(torch.int64)
    before = (counted.cumsum(0) * counted).sum(1) - 1  # tokens of the same adapter before this one
    blocks = (counted.sum(0) + size - 1) // size
    ends = blocks.cumsum(0)  # [adapters], in blocks
    start = (ends - blocks).index_select(0, adapter_ids.clamp(0, adapters - 1).to(torch.int64))
    place = torch.where(own, start * size + before, 0)
    most = min(tokens, (tokens + size - 1) // size + adapters)
    token = torch.full((most * size + 1,), tokens, device=device)
    to = torch.where(own, place, most * size)  # tokens without an adapter use a row that is cut off
    token = token.index_copy(0, to, torch.arange(tokens, device=device))[:-1]
    block = torch.arange(most, device=device).unsqueeze(1)
    adapter = (block >= ends).sum(1).clamp(max=adapters - 1)
    return TokenBlocks(own=own, place=place, token=token, adapter=adapter, size=size)
