"""Tuning: the fastest formulation is stored, unless it is faster only by noise."""

import inspect
import time

import pytest
import torch

from int4_lora.compiled import formulation_for, prepare, prepare_lora
from int4_lora.compiled.selection import choice, tuning
from int4_lora.compiled.selection.timing import Times, copies_beyond_the_cache, measure
from int4_lora.compiled.selection.tuning import tune
from support.weights import random_stack, random_weight

pytestmark = pytest.mark.versions


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_tables", {})


@pytest.fixture
def weight():
    return prepare(random_weight(rows=48, columns=128), layout="interleaved")


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock; return the seconds to measure by name, which are 1 by default."""
    seconds = {}

    def measured(callables, **_):
        return {name: Times([seconds.get(name, 1.0)] * 5) for name in callables}

    monkeypatch.setattr(tuning, "measure", measured)
    return seconds


def kept(weight, lora=None):
    slices = () if lora is None else lora.slices
    return choice.kept_crossovers(weight, torch.bfloat16, slices)


def test_the_fastest_is_kept(weight, clock):
    clock["tiles"] = 0.5
    points = tune(weight, torch.bfloat16, tokens=[1, 4, 8])
    assert [point.chosen for point in points] == ["tiles"] * 3
    assert set(points[0].milliseconds) == {"gemv", "tiles"}
    assert kept(weight) == [(4, "tiles"), (8, "default")]
    assert formulation_for(weight, torch.bfloat16, 1).name == "tiles"


def test_the_default_stays_where_another_is_hardly_faster(weight, clock):
    clock["tiles"] = 0.98
    tune(weight, torch.bfloat16, tokens=[1, 4])
    assert kept(weight) == [(4, "default")]
    names = [formulation_for(weight, torch.bfloat16, tokens).name for tokens in (1, 4, 5)]
    assert names == ["gemv", "gemv", "tiles"]


def test_each_point_speaks_for_those_up_to_it(weight, monkeypatch):
    fast = {1: "tiles", 2: "gemv", 4: "tiles", 8: "tiles"}

    def measured(callables, *, seed, **_):
        return {name: Times([0.5 if name == fast[seed] else 1.0] * 5) for name in callables}

    monkeypatch.setattr(tuning, "measure", measured)
    seen = []
    tune(weight, torch.bfloat16, tokens=[1, 2, 4, 8], progress=seen.append)
    assert kept(weight) == [(1, "tiles"), (2, "default"), (4, "tiles"), (8, "default")]
    assert seen == [1, 2, 4, 8]


def test_a_point_does_not_speak_for_tokens_that_its_formulation_refuses(clock):
    weight = prepare(random_weight(rows=48, columns=128), layout="interleaved")
    clock["gemv"] = 0.5
    tune(weight, torch.bfloat16, tokens=[1, 3])
    assert kept(weight) == [(3, "default")]


def test_what_was_not_measured_is_as_usual():
    """A run that measures only 1 token must not change the choice for 4096 tokens."""
    weight = prepare(random_weight(rows=48, columns=128, dtype=torch.bfloat16))
    usual = [formulation_for(weight, torch.bfloat16, n).name for n in (1, 16, 17, 4096)]
    tune(weight, torch.bfloat16, tokens=[1])
    assert [formulation_for(weight, torch.bfloat16, n).name for n in (1, 16, 17, 4096)] == usual
    tune(weight, torch.bfloat16, tokens=[64])
    assert formulation_for(weight, torch.bfloat16, 8).name == usual[1]


def test_adapters_are_kept_apart(weight, clock):
    lora = prepare_lora(random_stack(rows=48, columns=128))
    clock["tiles"] = 0.5
    tune(weight, torch.bfloat16, lora, tokens=[1])
    assert kept(weight) is None
    assert kept(weight, lora) == [(1, "tiles")]
    more = random_stack(adapters=5, rank=4, rows=48, columns=128, dtype=torch.bfloat16)
    assert kept(weight, prepare_lora(more)) == [(1, "tiles")]
    wider = random_stack(rank=5, rows=48, columns=128)
    assert kept(weight, prepare_lora(wider)) is None


def test_it_measures_what_runs(weight):
    (point,) = tune(weight, torch.bfloat16, tokens=[2])
    assert set(point.milliseconds) == {"gemv", "tiles"}
    assert all(milliseconds > 0 for milliseconds in point.milliseconds.values())
    assert kept(weight) is not None


@pytest.mark.parametrize("tokens", [[], [0, 1], [2, 1], [1, 1]])
def test_bad_tokens(weight, tokens):
    with pytest.raises(ValueError, match="tokens must ascend from 1 or more"):
        tune(weight, torch.bfloat16, tokens=tokens)


def test_nothing_is_measured_where_nothing_can_be_kept(weight, clock, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file cannot be written"):
        tune(weight, torch.bfloat16, tokens=[1])


def test_the_operator_is_timed_as_it_is_called(monkeypatch):
    weight = prepare(random_weight(rows=48, columns=128, dtype=torch.bfloat16))
    compiled = []
    monkeypatch.setattr("int4_lora.compiled.products.SLOW_ON_CPU", ())  # one graph for the layer
    monkeypatch.setattr(torch, "compile", lambda layer, **_: compiled.append(layer) or layer)
    tune(weight, torch.bfloat16, tokens=[16])
    layers = [inspect.getclosurevars(function).nonlocals["function"] for function in compiled]
    formulations = [inspect.getclosurevars(layer).nonlocals["formulation"] for layer in layers]
    assert [formulation.name for formulation in formulations] == ["tiles"]


def test_rounds_are_shuffled_and_end_with_the_budget():
    order = []
    calls = {name: lambda _, name=name: order.append(name) for name in "abcdef"}
    measure(calls, rounds=20, budget=100)
    rounds = [tuple(order[at : at + 6]) for at in range(18, len(order), 6)]
    assert len(set(rounds)) > 10
    slow = {"one": lambda _: time.sleep(0.02)}
    assert len(measure(slow, rounds=1000, budget=0.2)["one"].seconds) < 20


def test_copies_leave_the_cache_behind():
    assert copies_beyond_the_cache(8 * 2**20) == 8
    assert copies_beyond_the_cache(2**30) == 2
    assert copies_beyond_the_cache(1) == 64


def test_every_callable_is_timed_once_a_round():
    calls = {"one": [], "other": []}
    found = measure({name: calls[name].append for name in calls}, rounds=6, budget=100)
    assert calls["one"] == [0, 1, 2, *range(6)]  # three to warm up
    assert all(len(one.seconds) == 6 for one in found.values())
