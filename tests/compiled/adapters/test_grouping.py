"""Tokens grouped by adapter: each adapted token has one row, and each block one adapter."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given

from int4_lora.compiled.adapters.grouping import bring_together
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import gathered, grouped, masked

pytestmark = pytest.mark.versions

IDS = st.lists(st.integers(-2, 6), max_size=40)


@given(IDS, st.integers(1, 5), st.integers(1, 9))
@example([0] * 9 + [1, 2, 3, 4], 5, 4)  # each adapter's last block is nearly empty
@example([4] * 8, 5, 4)
@example([-1, 5, 6], 5, 2)
def test_every_token_is_in_a_block_of_its_adapter(ids, adapters, size):
    blocks = bring_together(torch.tensor(ids, dtype=torch.int64), adapters, size)
    own = [index for index, one in enumerate(ids) if 0 <= one < adapters]
    assert blocks.own.tolist() == [index in own for index in range(len(ids))]
    places = [int(blocks.place[index]) for index in own]
    assert len(set(places)) == len(own)
    for index, place in zip(own, places, strict=True):
        assert int(blocks.token[place]) == index
        assert int(blocks.adapter[place // size]) == ids[index]
    filled = sorted(token for token in blocks.token.tolist() if token < len(ids))
    assert filled == own
    assert len(blocks.adapter) <= len(ids)


@given(IDS, st.integers(1, 9))
def test_rows_come_back(ids, size):
    x = torch.arange(1.0, 3 * len(ids) + 1).view(-1, 3)
    blocks = bring_together(torch.tensor(ids, dtype=torch.int32), 4, size)
    gathered = blocks.gather(x)
    assert gathered.shape == (len(blocks.adapter), size, 3)
    own = torch.tensor([0 <= one < 4 for one in ids], dtype=torch.bool)
    assert torch.equal(blocks.scatter(gathered), torch.where(own[:, None], x, 0))


@pytest.mark.parametrize("tokens", [1, 17, 70])
def test_grouped_and_masked_agree(tokens):
    generator = torch.Generator().manual_seed(tokens)
    a, bt = torch.randn(5, 3, 32, generator=generator), torch.randn(5, 3, 8, generator=generator)
    one = PreparedSlice(a, bt, torch.tensor([0.5, 1.0, -2.0, 0.1, 3.0]), 0)
    x = torch.randn(tokens, 32, generator=generator)
    ids = torch.randint(-1, 6, (tokens,), generator=generator)
    assert torch.allclose(grouped(x, one, ids), masked(x, one, ids), atol=1e-4)


@pytest.mark.parametrize("term", [gathered, grouped, masked])
def test_the_scaling_comes_last(term):
    """As in the reference: if x were scaled first, a finite delta could overflow on the way."""
    a, bt = torch.ones(2, 3, 32), torch.full((2, 3, 8), 1e-37)
    one = PreparedSlice(a, bt, torch.tensor([1e38, 1.0]), 0)
    delta = term(torch.ones(5, 32), one, torch.zeros(5, dtype=torch.int64))
    assert torch.allclose(delta, torch.full((5, 8), 960.0))
