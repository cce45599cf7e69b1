"""Extend rows to whole blocks of words, so that a kernel masks nothing in its loop.

Where a row does not fill the blocks of words that a kernel reads at a time (``Launch.words``),
Inductor masks every load and every product. Here the last group is repeated instead, with scales of
0, until the blocks are full. Only indices change: compiled, nothing is copied, and the repeated
words have just been read. The repeated groups add 0 unless x is not finite: an x of the last group
that is not finite may give NaN where the definition gives an infinity.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from int4_lora.compiled.layouts.interleaved import NIBBLES, InterleavedWeight

__all__ = ["whole_blocks", "words_of_whole_blocks"]


def words_of_whole_blocks(weight: InterleavedWeight, words: int) -> int:
    """Return the number of words of a row after ``whole_blocks``.

    Args:
        weight: the weight.
        words: words per block.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = InterleavedWeight.from_packed(quantize(torch.ones(8, 96), group_size=32))
        >>> weight.words.shape[1], words_of_whole_blocks(weight, 8)
        (12, 16)
    """
    own = weight.words.shape[1]
    if words % weight.words_of_a_group:
        return own  # a block holds no whole number of groups
    return -(-own // words) * words


def whole_blocks(
    x: Tensor, weight: InterleavedWeight, words: int
) -> tuple[Tensor, InterleavedWeight]:
    """Return x and the weight with the last group repeated until the blocks are full.

    Args:
        x: ``[tokens, in_features]``, its columns in the weight's order.
        weight: the weight; returned without ``order``, which x follows already.
        words: words per block.
    """
    weight = dataclasses.replace(weight, order=None)
    length = words_of_whole_blocks(weight, words)
    if length == weight.words.shape[1]:
        return x, weight
    place = torch.arange(length // weight.words_of_a_group, dtype=torch.int32, device=x.device)
    group = place.clamp(max=weight.groups - 1)
    own = place < weight.groups
    columns = x.view(x.shape[0], weight.groups, -1).index_select(1, group).flatten(1)
    repeated = (
        weight.words.view(weight.out_features, weight.groups, -1).index_select(1, group).flatten(1)
    )
    zeros = None if weight.zero_point is None else weight.zero_point.index_select(1, group)
    return columns, dataclasses.replace(
        weight,
        words=repeated,
        scale=torch.where(own, weight.scale.index_select(1, group), 0),
        shape=(weight.out_features, length * NIBBLES),
        zero_point=zeros,
    )
