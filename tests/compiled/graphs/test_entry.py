"""A layer called at the least cost: the same results, and no Dynamo after the first such call."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from int4_lora.compiled import int4_lora_linear, prepare, prepare_lora
from int4_lora.compiled.graphs import cache as graphs
from int4_lora.compiled.graphs import entry as entries
from int4_lora.compiled.linear import BoundLayer
from support.weights import random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

ROWS, COLUMNS = 48, 128


@pytest.fixture
def layer(request):
    rank = getattr(request, "param", 4)
    weight = prepare(random_weight(rows=ROWS, columns=COLUMNS, dtype=torch.bfloat16))
    stack = random_stack(adapters=3, rank=rank, rows=ROWS, columns=COLUMNS, dtype=torch.bfloat16)
    return BoundLayer(weight, prepare_lora(stack), torch.linspace(-1, 1, ROWS).bfloat16())


@pytest.fixture
def dynamo(monkeypatch):
    """Return a list that records each compiled graph, and each call that goes through Dynamo."""
    asked = []
    compile_graph, enter = entries.compile_graph, entries._Guarded.__call__

    def compiled(*arguments):
        asked.append("compiled")
        return compile_graph(*arguments)

    def entered(self, *by_tokens):
        asked.append("entered")
        return enter(self, *by_tokens)

    monkeypatch.setattr(entries, "compile_graph", compiled)
    monkeypatch.setattr(entries._Guarded, "__call__", entered)
    monkeypatch.setattr(graphs, "_graphs", {})
    return asked


def ids_of(tokens, shift=0):
    return (torch.arange(tokens) + shift) % 4 - 1


def same(layer, x, ids):
    expected = int4_lora_linear(x, layer.weight, layer.lora, ids, layer.bias)
    found = layer(x, ids)
    assert found.dtype == expected.dtype
    return torch.equal(found, expected)


@pytest.mark.parametrize("inference", [True, False])
def test_calls_like_one_before_go_to_the_graph(layer, dynamo, inference, monkeypatch):
    with torch.inference_mode(inference), torch.no_grad():
        for tokens in (1, 2, 7, 24):
            layer(random_x(tokens, COLUMNS, torch.bfloat16), ids_of(tokens))
        assert dynamo == ["compiled"] * 2  # the buckets {1} and {2 to 24}
        for seed, tokens in enumerate((7, 1, 24, 2, 7)):
            x, ids = random_x(tokens, COLUMNS, torch.bfloat16, seed), ids_of(tokens, seed)
            expected = int4_lora_linear(x, layer.weight, layer.lora, ids, layer.bias)
            with monkeypatch.context() as patch:
                patch.setattr("int4_lora.compiled.linear.check_operands", None)
                patch.setattr("int4_lora.compiled.linear.plan", None)
                assert torch.equal(layer(x, ids), expected)
    assert dynamo == ["compiled"] * 2


def test_many_tokens_and_new_numbers_of_them_go_the_usual_way(layer):
    with torch.inference_mode():
        for tokens in (25, 40, 25, 0, 3, 200, 2**15 + 1):
            for _ in range(2):
                assert same(layer, random_x(tokens, COLUMNS, torch.bfloat16), ids_of(tokens))


def test_after_many_numbers_of_tokens_new_ones_are_still_kept(layer, monkeypatch):
    monkeypatch.setattr("int4_lora.compiled.linear.MOST_ENTRIES", 3)
    with torch.inference_mode():
        for tokens in range(1, 9):
            assert same(layer, random_x(tokens, COLUMNS, torch.bfloat16), ids_of(tokens))
            with monkeypatch.context() as patch:
                patch.setattr("int4_lora.compiled.linear.plan", None)
                layer(random_x(tokens, COLUMNS, torch.bfloat16), ids_of(tokens))
            assert len(layer._entries) <= 3


def test_what_differs_from_the_call_before_is_seen(layer):
    x, ids = random_x(5, COLUMNS, torch.bfloat16), ids_of(5)
    with torch.no_grad():
        assert same(layer, x, ids)
        assert same(layer, x.float(), ids)
        assert same(layer, random_x(5, 2 * COLUMNS, torch.bfloat16)[:, ::2], ids)
        assert same(layer, x, ids.to(torch.int32))
        assert same(layer, x, ids_of(10)[::2])
        with torch.inference_mode():
            assert same(layer, x, ids)
            assert same(layer, x.clone(), ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert same(layer, x, ids)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert same(layer, x, ids)
        finally:
            torch.set_num_threads(threads)
    wanted = x.clone().requires_grad_()
    assert same(layer, wanted, ids)
    layer(wanted, ids).sum().backward()
    assert wanted.grad is not None
    with pytest.raises(ValueError, match=r"\[tokens, in_features\]"):
        layer(x[:, :-1], ids)
    with pytest.raises(ValueError, match=r"\[tokens\]"):
        layer(x, ids[:-1])


@pytest.mark.parametrize(
    ("layer", "tokens"),
    [(4, 6), (65, 40)],  # gathered, and masked as long as all are finite
    indirect=["layer"],
)
def test_an_adapter_put_in_place_is_used_and_an_infinite_one_reaches_nobody_else(layer, tokens):
    x, ids = random_x(tokens, COLUMNS, torch.bfloat16), ids_of(tokens)
    others = ids != 1
    with torch.inference_mode():
        before = layer(x, ids)
        a, b = torch.ones(4, COLUMNS).bfloat16(), torch.ones(ROWS, 4).bfloat16()  # rank 4
        layer.lora.update(1, [(a, b, 0.5)])
        after = layer(x, ids)
        assert torch.equal(before[others], after[others])
        assert not torch.isclose(before[ids == 1], after[ids == 1]).all(1).any()
        layer.lora.update(1, [(a, torch.full_like(b, float("inf")), 0.5)])
        assert same(layer, x, ids)
        assert layer(x, ids)[others].isfinite().all()


def test_a_weight_that_is_written_to_is_read_anew(layer):
    x, ids = random_x(6, COLUMNS, torch.bfloat16), ids_of(6)
    other = prepare(random_weight(rows=ROWS, columns=COLUMNS, dtype=torch.bfloat16, seed=1))
    with torch.inference_mode():
        before = layer(x, ids)
        for old, new in zip(layer.weight.tensors, other.tensors, strict=True):
            old.copy_(new)
        after = layer(x, ids)
        assert not torch.equal(before, after)
        assert torch.equal(after, int4_lora_linear(x, other, layer.lora, ids, layer.bias))


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_under_a_mode_of_torch_dynamo_is_asked(layer, dynamo):
    x, ids = random_x(3, COLUMNS, torch.bfloat16), ids_of(3)
    with torch.no_grad():
        expected = layer(x, ids)
        assert torch.equal(layer(x, ids), expected)
        assert dynamo == ["compiled"]
        with Counting():
            for _ in range(2):
                assert torch.equal(layer(x, ids), expected)
        assert dynamo == ["compiled", "compiled", "entered", "entered"]


def test_a_graph_whose_inputs_are_unknown_is_entered_through_dynamo(layer, dynamo, monkeypatch):
    monkeypatch.setattr(graphs, "_places", lambda *_: ())
    x = random_x(3, COLUMNS, torch.bfloat16)
    with torch.no_grad():
        for shift in range(3):
            assert same(layer, x, ids_of(3, shift))
    assert dynamo.count("compiled") == 1
    assert dynamo.count("entered") == 6
    assert all(graph.direct is None for graph in graphs._graphs.values())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own, in jvp
def test_transforms_of_torch_func_go_the_usual_way(layer):
    x, ids = random_x(3, COLUMNS, torch.float32), ids_of(3)
    with torch.no_grad():
        expected = layer(x, ids)
        assert torch.equal(layer(x, ids), expected)
        several = torch.func.vmap(lambda v: layer(v, ids))(torch.stack([x, -x]))
        usual = torch.func.vmap(
            lambda v: int4_lora_linear(v, layer.weight, layer.lora, ids, layer.bias)
        )
        assert torch.equal(several, usual(torch.stack([x, -x])))
    _, tangent = torch.func.jvp(lambda v: layer(v, ids), (x,), (x,))
    _, other = torch.func.jvp(
        lambda v: int4_lora_linear(v, layer.weight, layer.lora, ids, layer.bias), (x,), (x,)
    )
    assert torch.equal(tangent, other)
