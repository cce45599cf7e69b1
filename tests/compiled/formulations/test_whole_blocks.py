"""Rows padded to whole blocks of words: the product is the same, and no mask is needed."""

import pytest
import torch

from int4_lora.compiled.formulations.whole_blocks import whole_blocks, words_of_whole_blocks
from int4_lora.compiled.layouts.interleaved import InterleavedWeight
from support.weights import random_weight

pytestmark = pytest.mark.versions


def operands(groups, symmetric=True):
    weight = random_weight(rows=12, columns=32 * groups, groups=groups, symmetric=symmetric)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32 * groups, generator=generator)
    return x, InterleavedWeight.from_packed(weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("groups", "padded"), [(1, 4), (3, 4), (4, 4), (5, 8)])
def test_the_product_stays_and_blocks_are_full(groups, padded, symmetric):
    x, weight = operands(groups, symmetric)
    columns, whole = whole_blocks(x, weight, 16)
    assert whole.groups == padded
    assert whole.words.shape[1] == words_of_whole_blocks(weight, 16) == 4 * padded
    dense, own = whole.rows(0, 12, torch.float32), weight.rows(0, 12, torch.float32)
    assert torch.equal(dense[:, : 32 * groups], own)
    assert torch.equal(columns[:, : 32 * groups], x)
    assert dense[:, 32 * groups :].count_nonzero() == 0
    assert columns.isfinite().all()


def test_a_group_that_fills_no_part_of_a_block_is_left_alone():
    x, weight = operands(3)
    columns, whole = whole_blocks(x, weight, 6)
    assert columns is x
    assert whole.words is weight.words
