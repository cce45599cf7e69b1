"""The slices' terms, side by side on a CPU and spread over all outputs on a GPU, are the same."""

import pytest
import torch
from torch.nn.functional import pad

from int4_lora.compiled.adapters.terms import side_by_side, spread

pytestmark = pytest.mark.versions


@pytest.mark.parametrize(
    ("start", "width", "outputs"),
    [(0, 7, 7), (0, 3, 7), (3, 4, 7), (5, 2, 9), (2, 1, 4), (4, 3, 20), (12, 8, 20)],
)
def test_spread_is_padded(start, width, outputs):
    delta = torch.arange(1.0, 1 + 2 * width).view(2, width)
    padded = pad(delta, (start, outputs - start - width))
    assert torch.equal(spread(delta, start, outputs), padded)


@pytest.mark.parametrize("places", [[], [0], [5], [8], [5, 0], [2, 5, 8], [0, 3, 6]])
def test_side_by_side_is_the_sum_of_padded_terms(places):
    base, bias = torch.arange(22.0).view(2, 11), torch.arange(11.0) / 8
    deltas = [(start, torch.full((2, 3), 100.0 * (start + 1))) for start in places]
    padded = sum(pad(delta, (start, 8 - start)) for start, delta in deltas)
    found = side_by_side(base.bfloat16(), deltas, bias, torch.float32, torch.float32)
    assert torch.equal(found, base + padded + bias)


def test_spread_keeps_a_nan_within_its_slice():
    delta = torch.full((1, 2), torch.nan)
    assert spread(delta, 1, 5).isnan().tolist() == [[False, True, True, False, False]]
