"""UnpackedWeightCache: never stale, within its budget, shared by threads, and given back."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from int4_lora.integration import UnpackedWeightCache
from int4_lora.integration.checkpoint import cache as unpacked_weight_cache
from int4_lora.reference import PackedWeight, dequantize
from support.weights import random_weight

pytestmark = pytest.mark.versions

DENSE = 13 * 44 * 4  # bytes of one random weight in float32


@pytest.fixture
def cache():
    return UnpackedWeightCache(max_bytes=10 * DENSE)


@pytest.fixture
def count(monkeypatch):
    """Return the list of weights that were unpacked."""
    unpacked = []

    def counting(weight, dtype=None):
        unpacked.append(weight)
        return dequantize(weight, dtype)

    monkeypatch.setattr(unpacked_weight_cache, "dequantize", counting)
    return unpacked


def test_unpacks_once(cache, count):
    weight = random_weight(symmetric=False)
    first = cache.get(weight)
    assert torch.equal(first, dequantize(weight))
    assert cache.get(weight) is first
    assert len(count) == len(cache) == 1
    assert cache.nbytes == DENSE


def test_each_dtype_is_its_own(cache):
    weight = random_weight(dtype=torch.bfloat16)
    assert cache.get(weight).dtype == torch.bfloat16
    assert cache.get(weight, torch.float32).dtype == torch.float32
    assert cache.get(weight, torch.bfloat16) is cache.get(weight)
    assert len(cache) == 2


def test_weights_with_the_same_tensors_are_told_apart(cache):
    one = random_weight("g_idx")
    other = PackedWeight(one.packed, one.scale, one.shape)
    assert not torch.equal(cache.get(one), cache.get(other))


@pytest.mark.parametrize("part", ["packed", "scale", "zero_point", "g_idx"])
def test_a_weight_changed_in_place_is_unpacked_again(cache, part):
    weight = random_weight("g_idx_unbalanced", symmetric=False)
    before = cache.get(weight).clone()
    tensor = getattr(weight, part)
    tensor.copy_(tensor.flip(0))
    after = cache.get(weight)
    assert not torch.equal(after, before)
    assert torch.equal(after, dequantize(weight))
    assert len(cache) == 1


def test_a_caller_that_writes_to_the_result_spoils_it_for_nobody_else(cache):
    weight = random_weight()
    cache.get(weight).zero_()
    assert torch.equal(cache.get(weight), dequantize(weight))


def test_writes_that_are_not_counted_call_for_discard(cache):
    weight = random_weight()
    before = cache.get(weight)
    weight.scale.data.mul_(2)
    assert cache.get(weight) is before  # what the docstring warns of
    cache.discard(weight)
    assert torch.equal(cache.get(weight), dequantize(weight))
    cache.discard(random_weight())


def test_inference_tensors_are_never_kept(cache):
    with torch.inference_mode():
        weight = random_weight()
    assert torch.equal(cache.get(weight), dequantize(weight))
    assert len(cache) == 0


def test_an_ordinary_weight_is_kept_in_inference_mode_too(cache):
    weight = random_weight()
    with torch.inference_mode():
        dense = cache.get(weight)
        assert cache.get(weight) is dense
    assert cache.get(weight) is dense
    assert torch.equal(dense, dequantize(weight))


def test_least_recently_used_go_first():
    cache = UnpackedWeightCache(max_bytes=2 * DENSE)
    one, two, three = (random_weight(seed=seed) for seed in range(3))
    kept = cache.get(one)
    cache.get(two)
    assert cache.get(one) is kept
    cache.get(three)  # evicts two
    assert cache.get(one) is kept
    assert cache.nbytes == 2 * DENSE


def test_what_is_larger_than_the_budget_is_returned_and_not_kept():
    weight = random_weight()
    for budget in (0, DENSE - 1):
        cache = UnpackedWeightCache(max_bytes=budget)
        assert torch.equal(cache.get(weight), dequantize(weight))
        assert (len(cache), cache.nbytes) == (0, 0)


def test_clear_gives_the_memory_back(cache):
    weight = random_weight()
    dense = weakref.ref(cache.get(weight))
    assert dense() is not None
    cache.clear()
    assert dense() is None
    assert (len(cache), cache.nbytes) == (0, 0)


def test_evicted_and_replaced_tensors_are_freed():
    cache = UnpackedWeightCache(max_bytes=DENSE)
    one, two = random_weight(), random_weight(seed=1)
    first = weakref.ref(cache.get(one))
    cache.get(two)
    assert first() is None
    second = weakref.ref(cache.get(two))
    two.scale.mul_(2)
    cache.get(two)
    assert second() is None


def test_a_weight_that_is_gone_takes_its_entry_along(cache):
    weight = random_weight()
    dense = weakref.ref(cache.get(weight))
    del weight
    gc.collect()
    assert dense() is None
    assert (len(cache), cache.nbytes) == (0, 0)


def test_a_weight_collected_while_the_lock_is_held_is_dropped_afterwards(cache):
    weight = random_weight()
    cache.get(weight)
    with cache._lock:
        del weight
        gc.collect()
    assert (len(cache), cache.nbytes) == (0, 0)


def test_eight_threads_share_one_tensor_and_the_budget():
    cache = UnpackedWeightCache(max_bytes=3 * DENSE)
    weights = [random_weight(seed=seed) for seed in range(6)]
    expected = [dequantize(weight) for weight in weights]
    start = threading.Barrier(8)

    def work(seed):
        start.wait()
        generator = torch.Generator().manual_seed(seed)
        for index in torch.randint(6, (300,), generator=generator).tolist():
            assert torch.equal(cache.get(weights[index]), expected[index])
            assert cache.nbytes <= 3 * DENSE
            if index == 5 and seed == 0:
                cache.clear()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    held = [cache.get(weights[0]) for _ in range(2)]
    assert held[0] is held[1]


def test_threads_that_ask_at_once_get_the_same_tensor(cache, count):
    weight, start = random_weight(), threading.Barrier(8)

    def work(_):
        start.wait()
        return cache.get(weight)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    assert all(result is results[0] for result in results)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("gmdc")), max_size=30))
def test_any_sequence_of_calls_keeps_the_books(calls):
    cache = UnpackedWeightCache(max_bytes=3 * DENSE)
    weights = [random_weight(seed=seed) for seed in range(5)]
    for index, call in calls:
        if call == "m":
            weights[index].scale.mul_(1.5)
        elif call == "d":
            cache.discard(weights[index])
        elif call == "c":
            cache.clear()
        else:
            assert torch.equal(cache.get(weights[index]), dequantize(weights[index]))
        assert cache.nbytes == len(cache) * DENSE <= 3 * DENSE


def test_refuses():
    with pytest.raises(TypeError, match="max_bytes must be an int, got float"):
        UnpackedWeightCache(1e9)
    with pytest.raises(ValueError, match="max_bytes must not be negative, got -1"):
        UnpackedWeightCache(-1)
    with pytest.raises(TypeError, match="must be a PackedWeight or Float4Weight, got Tensor"):
        UnpackedWeightCache(0).get(torch.ones(1))
