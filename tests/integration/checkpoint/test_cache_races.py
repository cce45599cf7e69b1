"""Writes that UnpackedWeightCache cannot count, or that come between unpacking and keeping."""

import dataclasses

import pytest
import torch

from int4_lora.integration import UnpackedWeightCache
from int4_lora.integration.checkpoint import cache as unpacked_weight_cache
from int4_lora.reference import dequantize
from support.weights import random_weight


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizers_writes_are_seen(optimizer):
    """Fused steps write without counting, so weights that want gradients are not kept."""
    scale = torch.nn.Parameter(torch.rand(13, 1) + 0.1)
    weight = dataclasses.replace(random_weight("channel"), scale=scale)
    cache = UnpackedWeightCache(max_bytes=2**20)
    before = cache.get(weight)
    scale.grad = torch.ones_like(scale)
    optimizer([scale], lr=0.5, fused=True).step()
    assert not torch.equal(cache.get(weight), before)
    assert torch.equal(cache.get(weight), dequantize(weight))
    assert len(cache) == 0


def test_a_weight_written_to_while_it_is_unpacked_is_not_kept(monkeypatch):
    weight = random_weight()
    cache = UnpackedWeightCache(max_bytes=2**20)

    def interrupted(given, dtype=None):
        dense = dequantize(given, dtype)
        given.scale.mul_(2)
        return dense

    monkeypatch.setattr(unpacked_weight_cache, "dequantize", interrupted)
    cache.get(weight)
    assert len(cache) == 0
    monkeypatch.undo()
    assert torch.equal(cache.get(weight), dequantize(weight))


def test_another_threads_stale_entry_is_not_served(monkeypatch):
    """Between unpacking and keeping, another thread kept an entry that a write then spoiled."""
    weight = random_weight()
    cache = UnpackedWeightCache(max_bytes=2**20)

    def overtaken(given, dtype=None):
        monkeypatch.undo()
        cache.get(given).mul_(3)  # the other thread's entry, written to by its caller
        return dequantize(given, dtype)

    monkeypatch.setattr(unpacked_weight_cache, "dequantize", overtaken)
    assert torch.equal(cache.get(weight), dequantize(weight))
