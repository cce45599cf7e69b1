"""The table of the original request: sizes, tiny layers, its text. No time is measured."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MACHINE = {
    "date": "2026-11-25", "gpu": "H200", "cpu": "Xeon", "cores": 8, "threads": 8, "torch": "2.13.0",
    "triton": "3.7.1", "vllm": None, "int4-lora": "0.1.0",
}  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_sizes_of_llama_2_7b(module):
    shapes = module("seed_table.shapes")
    model = shapes.Model()
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096
    assert model.whole_bytes("dense") == 2 * weights
    assert 1e-9 * model.whole_bytes("dense") == pytest.approx(13.48, abs=0.01)
    assert 1e-9 * model.whole_bytes("INT4") == pytest.approx(3.86, abs=0.01)
    adapters = model.whole_bytes("INT4 + LoRA") - model.whole_bytes("INT4")
    assert adapters == 32 * 2 * 16 * (4 * 8192 + 3 * 15104)


@pytest.mark.parametrize(("free", "layers"), [(0, 1), (15e9, 7), (80e9, 32)])
def test_layers_that_fit(module, free, layers):
    shapes = module("seed_table.shapes")
    assert shapes.layers_that_fit(shapes.Model(), free) == layers


@pytest.mark.parametrize("kind", ["dense", "INT4", "INT4 + LoRA"])
def test_a_holder_of_tiny_weights(module, kind):
    holder, shapes = module("seed_table.holder"), module("seed_table.shapes")
    sizes = {"hidden": 128, "intermediate": 256, "vocabulary": 64}
    one = holder.Holder()
    with torch.compiler.set_stance("force_eager"):
        made = one.make(kind, sizes, 2, "bfloat16", "cpu", torch.get_num_threads())
        assert one.run("layers") > 0
    assert one.run("head") > 0
    expected = sum(shapes.Model(**sizes).layer_bytes(kind))
    assert expected <= made["layer_bytes"] <= 1.2 * expected


def test_what_is_shared_counts_once(module):
    one = torch.ones(8, 4)
    held = module("seed_table.holder").held_bytes
    assert held([(one, [one.T, one[:2]], 4), (torch.ones(2), None, 2)]) == 8 * 4 * 4 + 2 * 4


def test_on_cuda_a_graph_is_replayed(module, monkeypatch):
    holder, modes = module("seed_table.holder"), module("modes")
    ran = []

    def cuda_graph(contender):
        for weight in contender.weights:
            contender.layer(weight)
        return modes.Ready(ran.append, 5 * len(contender.weights))

    monkeypatch.setattr(modes, "cuda_graph", cuda_graph)
    parts = [(1, 2, 3, lambda *given: ran.append(given))] * 2
    run, times = holder._ready(parts, "cuda")
    run()
    assert ran == [(1, 2, 3), (1, 2, 3), 0]
    assert times == 5


def test_random_words_hold_every_code(module):
    from int4_lora.reference import unpack

    generator = torch.Generator().manual_seed(0)
    weight = module("seed_table.holder").packed_weight(64, 256, 128, torch.bfloat16, generator)
    assert unpack(weight.packed, 256).unique().tolist() == list(range(-8, 8))


def test_the_table(module):
    model = module("seed_table.shapes").Model()
    seconds = {"dense": (1.0, 0.5), "INT4": (0.25, 0.5), "INT4 + LoRA": (0.275, 0.5)}
    found = {
        kind: {"layers": [layers] * 3, "head": [head] * 3, "layer_bytes": 1e8, "peak": 3e9,
               "making": 4e9, "of": "the process", "bytes_before": 4e8}
        for kind, (layers, head) in seconds.items()
    }  # fmt: skip
    text = module("seed_table.report").report(MACHINE, found, model, 8, "float16")
    lines = text.splitlines()
    assert lines[0] == "2026-11-25, H200, 8 threads, torch 2.13.0, triton 3.7.1, int4-lora 0.1.0:"
    assert lines[4] == ("| FP16 | 13.48 | 3.72 | 3.00 | 4.00 | 0.22 ±0 % | 1.00 x | 14 GB, 1.0 x |")
    assert lines[5].endswith("| 0.67 ±0 % | 3.00 x | 3.5 GB, 2.4 x |")
    assert lines[6].startswith("| INT4 + LoRA r = 16 | 3.94 | ")
    assert "8 measured and scaled to 32" in text
    assert "it adds 6.7 % of time" in text
    assert "scaled" not in module("seed_table.report").report(MACHINE, found, model, 32, "float16")


def test_options_of_the_table(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = module("seed_table.__main__")
    options = command.options_of(["--layers", "2"])
    assert (options.device, options.dtype, options.layers) == ("cpu", "bfloat16", 2)
    for given in (["--layers", "33"], ["--rounds", "1"], ["--hidden", "100"], ["--device", "cuda"]):
        with pytest.raises(SystemExit):
            command.options_of(given)


def test_the_table_is_written(module, monkeypatch, tmp_path, capsys):
    command = module("seed_table.__main__")
    one = {"layers": [1.0, 1.0], "head": [0.5, 0.5], "layer_bytes": 1e8, "peak": None,
           "making": None, "of": "the process", "bytes_before": None}  # fmt: skip
    monkeypatch.setattr(command, "measured", lambda *given: dict.fromkeys(command.KINDS, one))
    monkeypatch.setattr(command, "machine", lambda device: MACHINE)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--layers", "1", "--output", "table"]) == 0
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["machine"] == MACHINE
    assert kept["rows"]["INT4"]["weight_bytes"] == command.Model().whole_bytes("INT4")
