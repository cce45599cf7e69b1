"""The benchmark of experts: what it judges, counts and writes."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from support.eager_graphs import without_inductor

SIZES = {"hidden": 64, "inter": 32, "experts": 6, "chosen": 2, "adapters": 2, "rank": 3}


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def layer_of(module, group_size=32):
    layers = module("expert_layers")
    return layers.ExpertLayer(layers.Sizes(**SIZES, group_size=group_size), seed=0)


def test_rows_tables_and_bars(module, monkeypatch, tmp_path):
    experts = module("experts")
    without_inductor(monkeypatch)
    monkeypatch.setattr(module("machine"), "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(module("command"), "RESULTS", tmp_path)
    sizes = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    limits = ["--rounds", "3", "--budget", "0", "--threads", "1", "--layers", "2"]
    asked = ["--tokens", "1", "5", "--group-sizes", "32", "--output", "measured"]
    experts.main([*sizes, *limits, *asked])
    record = json.loads((tmp_path / "measured.json").read_text())
    assert [(row["group_size"], row["tokens"]) for row in record["rows"]] == [(32, 1), (32, 5)]
    for row in record["rows"]:
        assert row["refused"] == {}
        assert row["seconds"].keys() == {"ours", "ours + LoRA", "dense"}
        assert row["rounds"] == 2  # the budget is spent
        least = row["bytes"]["ours"] / record["machine"]["copy_bytes_per_second"]
        assert row["floor_milliseconds"]["ours"] == pytest.approx(1e3 * least)
        share = least / row["seconds"]["ours"]["median"]
        assert row["share_of_copy"]["ours"] == pytest.approx(share)
    assert [bar["limit"] for bar in record["bars"]] == [">= 0.5", "<= 1.15", "<= 1.15"]
    assert "| 32 | 5 |" in (tmp_path / "measured.md").read_text()


def test_bytes_are_those_of_the_used_experts(module):
    layer = layer_of(module)
    ids = torch.tensor([[0, 1], [1, 5]])
    # gate and up [64, 64], down [64, 32]; a scale for 32 columns
    codes, scales = (64 * 64 + 64 * 32) // 2, 2 * (64 * 2 + 64 * 1)
    assert layer.bytes_read(ids) == 3 * (codes + scales)
    pair = 2 * 3 * ((64 + 64) + (32 + 64))  # bfloat16, rank 3: A and B of both layers
    assert layer.bytes_read(ids, torch.tensor([0, 1])) == 3 * (codes + scales) + 4 * pair
    assert layer.bytes_read(ids, torch.tensor([0, 0])) == 3 * (codes + scales) + 3 * pair
    assert layer.dense_bytes_read(ids) == 3 * 2 * (64 * 64 + 64 * 32)


def test_dense_experts_are_the_formula(module):
    layers, layer = module("expert_layers"), layer_of(module)
    x, ids, p, _ = layers.routing(layer.sizes, 4, seed=1)
    gate_up, down = (weight.double() for weight in layer.dense)
    y = layers.dense_experts(x.double(), gate_up, down, ids, p.double())
    for token in range(4):
        expected = torch.zeros(64, dtype=torch.float64)
        for place, expert in enumerate(ids[token].tolist()):
            gate, up = (gate_up[expert] @ x[token].double()).chunk(2)
            h = gate * torch.sigmoid(gate) * up
            expected += p[token, place].double() * (down[expert] @ h)
        torch.testing.assert_close(y[token], expected, rtol=1e-12, atol=1e-12)


def test_wrong_numbers_are_found(module, monkeypatch):
    without_inductor(monkeypatch)
    layers, layer = module("expert_layers"), layer_of(module)
    batch = x, ids, p, adapter_ids = layers.routing(layer.sizes, 20, seed=1)
    with_lora = layer.ours_with_lora(*batch)
    assert layers.wrong_numbers(layer, with_lora, x, ids, p, adapter_ids) is None
    assert layers.wrong_numbers(layer, layer.ours(*batch), x, ids, p, adapter_ids) is not None
    assert layers.wrong_numbers(layer, layer.ours(*batch), x, ids, p, None) is None


def test_a_contender_that_fails_is_left_out(module, monkeypatch):
    without_inductor(monkeypatch)
    experts, layer = module("experts"), layer_of(module)

    def fails(layer, *operands):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(experts.CONTENDERS, "dense", fails)
    options = experts.options_of(["--rounds", "2", "--budget", "0"])
    row = experts.cell([layer], 3, options)
    assert row["refused"] == {"dense": "RuntimeError: no such kernel"}
    assert row["seconds"].keys() == {"ours", "ours + LoRA"}
