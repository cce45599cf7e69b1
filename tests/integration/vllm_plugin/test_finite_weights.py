"""Which weights of adapters are finite: looked at once."""

import gc

import pytest
import torch

from int4_lora.integration.vllm_plugin import finite_weights
from int4_lora.integration.vllm_plugin.finite_weights import FiniteWeights


@pytest.fixture
def looks(monkeypatch):
    """Return a list that gets the number of elements of each tensor that is looked at."""
    counts, look = [], finite_weights._look

    def counted(weight, dtype):
        counts.append(weight.numel())
        return look(weight, dtype)

    monkeypatch.setattr(finite_weights, "_look", counted)
    return counts


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite(value):
    weights = [torch.ones(4, 2), torch.ones(3, 2)]
    assert FiniteWeights().of(weights, torch.float32)
    weights[1][2, 0] = value
    assert not FiniteWeights().of(weights, torch.float32)


def test_the_dtype_of_the_slots_decides():
    finite, weight = FiniteWeights(), torch.full((2, 2), 3.4e38)
    assert finite.of([weight], torch.float32)
    assert not finite.of([weight], torch.bfloat16)
    assert finite.of([weight], torch.float32)
    assert finite.of([torch.empty(0, 3)], torch.float32)
    assert finite.of([torch.tensor([[3.38e38, -3.38e38]])], torch.float32)  # their difference isn't


def test_a_weight_is_looked_at_once(looks):
    finite, weights = FiniteWeights(), [torch.ones(4, 2), torch.ones(3, 2)]
    for _ in range(3):
        assert finite.of(weights, torch.float32)
    assert looks == [8, 6]


def test_a_write_is_noticed(looks):
    finite, weight = FiniteWeights(), torch.ones(4, 2)
    assert finite.of([weight], torch.float32)
    weight[1, 1] = torch.nan
    assert not finite.of([weight], torch.float32)
    assert looks == [8, 8]


def test_inference_tensors_are_looked_at_each_time(looks):
    """Torch does not count the writes to them."""
    finite = FiniteWeights()
    with torch.inference_mode():
        weight = torch.ones(4, 2)
        assert finite.of([weight], torch.float32)
        weight[0, 0] = torch.nan
        assert not finite.of([weight], torch.float32)
    assert looks == [8, 8]


def test_weights_are_not_kept_alive():
    finite = FiniteWeights()
    weight = torch.ones(4, 2)
    finite.of([weight], torch.float32)
    assert len(finite._known) == 1
    del weight
    gc.collect()
    assert len(finite._known) == 0
