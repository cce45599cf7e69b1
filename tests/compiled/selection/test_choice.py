"""Which formulation is chosen: the one stored for this kind of layer, else the default."""

import pytest
import torch

from int4_lora.compiled import formulation_for, int4_linear, prepare, prepare_lora
from int4_lora.compiled.formulations import Formulation, split_k
from int4_lora.compiled.selection import choice
from int4_lora.disk_cache import cache_folder
from int4_lora.reference import LoRASlice
from int4_lora.reference import int4_linear as reference_linear
from support.weights import narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

MANY = 2**31 - 1


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_tables", {})


@pytest.fixture
def weight():
    return prepare(random_weight(rows=48, columns=128), layout="interleaved")


def names(weight, lora=None, dtype=torch.bfloat16):
    return [formulation_for(weight, dtype, tokens, lora).name for tokens in (1, 4, 5, 100)]


def test_the_default_when_nothing_was_kept(weight):
    assert names(weight) == ["gemv", "gemv", "tiles", "tiles"]


def test_the_default_of_the_layout_checkpoint():
    weight = prepare(random_weight(rows=48, columns=128), layout="checkpoint")
    for dtype in (torch.bfloat16, torch.float32):
        found = [formulation_for(weight, dtype, tokens).name for tokens in (1, 24, 25, 1000)]
        assert found == ["definition", "definition", "tiles", "tiles"]


@pytest.mark.parametrize(
    ("form", "dtype", "expected"),
    [
        ({"layout": "channel"}, torch.bfloat16, ["int8pack", "int8pack", "tiles", "tiles"]),
        ({"layout": "channel"}, torch.float32, ["gemv", "tiles", "tiles", "tiles"]),
        ({"layout": "channel", "symmetric": False}, torch.bfloat16, ["gemv", *["tiles"] * 3]),
        ({}, torch.bfloat16, ["gemv", *["tiles"] * 3]),
    ],
)
def test_the_default_of_8_bits(form, dtype, expected):
    weight = prepare(random_weight(rows=48, columns=128, bits=8, dtype=torch.bfloat16, **form))
    assert [formulation_for(weight, dtype, n).name for n in (1, 24, 25, 1000)] == expected


def test_what_was_kept_is_chosen_in_this_process_and_the_next(weight, monkeypatch):
    choice.keep_crossovers(weight, torch.bfloat16, (), [(1, "gemv"), (MANY, "tiles")])
    assert names(weight) == ["gemv", "tiles", "tiles", "tiles"]
    monkeypatch.setattr(choice, "_tables", {})  # as in a new process
    assert names(weight) == ["gemv", "tiles", "tiles", "tiles"]


def test_it_is_kept_for_one_kind_of_layer_only(weight):
    choice.keep_crossovers(weight, torch.bfloat16, (), [(MANY, "tiles")])
    lora = prepare_lora(random_stack(rows=48, columns=128))
    default = ["gemv", "gemv", "tiles", "tiles"]
    assert names(weight, dtype=torch.float32) == default
    assert names(weight, lora) == default
    other = prepare(random_weight(rows=56, columns=128), layout="interleaved")
    assert names(other) == default
    choice.keep_crossovers(weight, torch.bfloat16, lora.slices, [(MANY, "tiles")])
    assert names(weight, lora) == ["tiles"] * 4
    stack = narrow(random_stack(rows=48, columns=128), 24)  # of the same rank
    for start in (0, 24):
        assert names(weight, prepare_lora([LoRASlice(stack, start)])) == default


def test_the_default_can_be_kept_and_stands_above_the_last(weight):
    choice.keep_crossovers(weight, torch.bfloat16, (), [(1, "tiles"), (2, "default"), (3, "tiles")])
    found = [formulation_for(weight, torch.bfloat16, tokens).name for tokens in range(1, 6)]
    assert found == ["tiles", "gemv", "tiles", "gemv", "tiles"]


def test_it_is_kept_for_this_process_where_the_disk_takes_nothing(weight, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path / "file"))
    assert not choice.keep_crossovers(weight, torch.bfloat16, (), [(MANY, "tiles")])
    assert names(weight) == ["tiles"] * 4


def test_another_number_of_threads_is_another_machine(weight, monkeypatch):
    choice.keep_crossovers(weight, torch.bfloat16, (), [(MANY, "tiles")])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert names(weight)[0] == "gemv"


@pytest.mark.parametrize(
    "kept",
    [
        [],
        7,
        [[1]],
        [["x", "tiles"]],
        [[float("inf"), "tiles"]],
        [["4", "tiles"]],
        [[True, "tiles"]],
        [[-5, "gemv"], [MANY, "tiles"]],
        [[4, "gemv"], [3, "gemv"], [MANY, "tiles"]],
        [[MANY, "no such formulation"]],
        [[MANY, "gemv"]],  # takes 4 tokens at most
        [[MANY, "int4pack"]],  # another layout
        {"tiles": 1},
        [[4, "default"], [4, "default"]],
    ],
)
def test_what_cannot_be_is_not_believed(weight, kept):
    key = choice._on_disk(choice._kind(weight, torch.bfloat16, ()))
    choice.remember(choice.CACHE, key, kept)
    assert names(weight) == ["gemv", "gemv", "tiles", "tiles"]


def test_the_layer_runs_what_was_chosen(monkeypatch):
    ran = []
    dense = random_weight(rows=48, columns=128, dtype=torch.bfloat16)
    weight = prepare(dense, layout="interleaved")
    monkeypatch.setattr("int4_lora.compiled.products.SLOW_ON_CPU", ())  # one graph for the layer
    monkeypatch.setattr("int4_lora.compiled.graphs.cache._graphs", {})
    monkeypatch.setattr(torch, "compile", lambda layer, **_: layer)
    monkeypatch.setattr(
        Formulation, "layer", lambda self, x, *_: ran.append(self.name) or x.new_ones(2, 48)
    )
    x = random_x(2, 128, torch.bfloat16)
    int4_linear(x, weight)
    choice.keep_crossovers(weight, torch.bfloat16, (), [(MANY, "tiles")])
    int4_linear(x, weight)
    assert list(dict.fromkeys(ran)) == ["gemv", "tiles"]


def test_within_another_graph_the_default_is_taken(weight):
    choice.keep_crossovers(weight, torch.float32, (), [(MANY, "tiles")])
    products = []

    def backend(graph, _):
        products.append(" @ " in graph.code)  # only tiles has a matrix product
        return graph.forward

    y = torch.compile(int4_linear, backend=backend, fullgraph=True)(random_x(2, 128), weight)
    assert products == [False]
    torch.compile(int4_linear, backend=backend, fullgraph=True)(random_x(5, 128), weight)
    assert products == [False, True]
    expected = reference_linear(random_x(2, 128).double(), weight.packed_weight())
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_disk_is_read_once_a_kind(weight, monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "recall", lambda kind, key: asked.append(kind))
    for _ in range(3):
        names(weight)
    assert asked == [choice.CACHE]
    assert not cache_folder().exists()


def test_defaults_of_a_gpu_are_those_meant_for_one(monkeypatch):
    weight = prepare(
        random_weight(rows=48, columns=128, dtype=torch.bfloat16), layout="interleaved"
    )
    monkeypatch.setattr(type(weight), "device", torch.device("cuda"))
    monkeypatch.setattr(split_k, "unavailable", lambda: None)

    def chosen(dtype, tokens, slices=(), inlined=False):
        return choice.default(weight, dtype, tokens, slices, inlined=inlined).name

    assert chosen(torch.bfloat16, 1) == "magic_gemv"
    assert [chosen(torch.bfloat16, tokens) for tokens in (2, 16, 64)] == ["split_k"] * 3
    assert chosen(torch.bfloat16, 65) == "tiles"
    wide = prepare_lora(random_stack(rows=48, columns=128, rank=65)).slices
    assert [chosen(torch.bfloat16, tokens, wide) for tokens in (1, 16)] == ["gemv", "split_k"]
    widest = prepare_lora(random_stack(rows=48, columns=128, rank=64)).slices
    assert chosen(torch.bfloat16, 1, widest) == "magic_gemv"
    assert chosen(torch.float32, 1) == "gemv"
    assert chosen(torch.float32, 5) == "tiles"
    assert chosen(torch.bfloat16, 1, inlined=True) == "gemv"  # no Inductor options there
    assert chosen(torch.bfloat16, 64, inlined=True) == "tiles"
    monkeypatch.setattr(split_k, "unavailable", lambda: "another torch")
    assert [chosen(torch.bfloat16, tokens) for tokens in (4, 5)] == ["magic_gemv", "tiles"]
