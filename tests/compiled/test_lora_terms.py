"""The slices' terms as terms of all outputs: padded on a CPU, spread on a GPU, and the same."""

import pytest
import torch

from int4_lora.compiled.lora_terms import padded, spread


@pytest.mark.parametrize(
    ("start", "width", "outputs"),
    [(0, 7, 7), (0, 3, 7), (3, 4, 7), (5, 2, 9), (2, 1, 4), (4, 3, 20), (12, 8, 20)],
)
def test_spread_is_padded(start, width, outputs):
    delta = torch.arange(1.0, 1 + 2 * width).view(2, width)
    assert torch.equal(spread(delta, start, outputs), padded(delta, start, outputs))


def test_spread_keeps_a_nan_within_its_slice():
    delta = torch.full((1, 2), torch.nan)
    assert spread(delta, 1, 5).isnan().tolist() == [[False, True, True, False, False]]
