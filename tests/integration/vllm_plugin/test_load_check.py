"""The check at load: correct layers pass, wrong ones do not."""

import dataclasses
import re

import pytest
import torch

from int4_lora.compiled import prepare
from int4_lora.compiled.graphs.cache import _own_code, bucket_of
from int4_lora.compiled.products import SLOW_ON_CPU
from int4_lora.integration.vllm_plugin import load_check
from int4_lora.integration.vllm_plugin.load_check import (
    fault_of_addition,
    fault_of_layer,
    graph_key_of_layer,
    tokens_of_each_graph,
)
from int4_lora.integration.vllm_plugin.options import Options
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer, adapter_slots, add_eagerly
from int4_lora.reference import quantize


@pytest.fixture(scope="module")
def weight():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(96, 128, generator=generator)
    return quantize(dense.bfloat16(), group_size=32, symmetric=False)


@pytest.fixture
def lora():
    a = [torch.zeros(3, 1, 4, 128, dtype=torch.bfloat16) for _ in range(2)]
    b = [torch.zeros(3, 1, rows, 4, dtype=torch.bfloat16) for rows in (64, 32)]
    return adapter_slots(a, b)[0]


@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")  # Inductor, of what is meant here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_a_right_layer_passes(weight, lora, tokens, dtype):
    prepared, bias = prepare(weight), torch.linspace(-1, 1, 96).to(dtype)
    assert fault_of_layer(weight, prepared, dtype, tokens) is None
    if dtype == torch.bfloat16:
        assert fault_of_layer(weight, prepared, dtype, tokens, lora, bias) is None
        assert fault_of_addition(lora, 96, dtype, tokens) is None


def changed(weight, **changes):
    return prepare(dataclasses.replace(weight, **changes))


@pytest.mark.parametrize("tokens", [1, 5])
def test_another_weight_does_not_pass(weight, tokens):
    for wrong in (
        changed(weight, packed=weight.packed ^ 1),  # one code of each word, by one
        changed(weight, scale=weight.scale.roll(1, 1)),
        changed(weight, zero_point=weight.zero_point.roll(1, 1)),
    ):
        assert "bounds away" in (fault_of_layer(weight, wrong, torch.bfloat16, tokens) or "")
        assert not wrong.holds(weight)


def planted(function, change):
    def wrong(*operands):
        return change(function(*operands))

    return wrong


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.float(), "returned torch.float32, not torch.bfloat16"),
        (lambda y: y[:, :-1], r"returned \[\d+, 95\], not \[\d+, 96\]"),
        (lambda y: y.index_fill(0, torch.tensor([0]), float("nan")), "is nan, the exact answer is"),
        (lambda y: y * 1.004, "rms|bounds away"),
    ],
)
def test_a_wrong_result_does_not_pass(weight, lora, change, message, tokens, monkeypatch):
    for name in ("int4_lora_linear", "add_lora"):
        monkeypatch.setattr(load_check, name, planted(getattr(load_check, name), change))
    prepared = prepare(weight)
    for fault in (
        fault_of_addition(lora, 96, torch.bfloat16, tokens),
        fault_of_layer(weight, prepared, torch.bfloat16, tokens),
        fault_of_layer(weight, prepared, torch.bfloat16, tokens, lora),
    ):
        assert re.search(message, fault or "")


@pytest.mark.parametrize("tokens", [1, 5])
def test_ids_that_are_swapped_do_not_pass(weight, lora, tokens, monkeypatch):
    right = load_check.int4_lora_linear

    def other_ids(x, prepared, adapters, ids, bias):
        return right(x, prepared, adapters, None if ids is None else (ids + 1) % 3, bias)

    monkeypatch.setattr(load_check, "int4_lora_linear", other_ids)
    prepared = prepare(weight)
    fault = fault_of_layer(weight, prepared, torch.bfloat16, tokens, lora)
    assert "bounds away" in (fault or "")
    assert fault_of_layer(weight, prepared, torch.bfloat16, tokens) is None


def test_one_number_of_tokens_for_each_graph():
    products = [] if torch.bfloat16 in SLOW_ON_CPU else [97]  # other products for many tokens
    assert tokens_of_each_graph(8192, bucket_of) == [1, 3, 26, *products]
    assert tokens_of_each_graph(3, bucket_of) == [1, 3]
    assert tokens_of_each_graph(8192, lambda tokens: bucket_of(tokens, "cuda")) == [1, 3, 18, 66]
    assert tokens_of_each_graph(1, bucket_of) == [1]


def test_formulations_within_a_bucket_are_graphs_of_their_own(weight, lora):
    prepared = prepare(weight)  # with zero-points: gemv, and tiles from 5 tokens on
    for adapters in (None, lora):
        graphs = [graph_key_of_layer(prepared, torch.bfloat16, t, adapters) for t in range(1, 100)]
        chosen = tokens_of_each_graph(99, lambda t, graphs=graphs: graphs[t - 1])
        assert {graphs[tokens - 1] for tokens in chosen} == set(graphs)
        assert len({name for name, _ in graphs}) == 2


def test_what_vllm_writes_to_slots_is_what_is_computed_with(weight):
    generator = torch.Generator().manual_seed(1)
    a = (torch.zeros(2, 1, 4, 128, dtype=torch.bfloat16),)
    b = (torch.zeros(2, 1, 96, 4, dtype=torch.bfloat16),)
    lora, views = adapter_slots(a, b)
    served = ServedLayer("layer", weight=prepare(weight), lora=lora)
    x = torch.randn(3, 128, generator=generator).bfloat16()
    ids, none = torch.tensor([1, -1, 0]), torch.tensor([-1, -1, -1])
    base = served.forward(x, None, None)
    own_a = torch.randn(4, 128, generator=generator).bfloat16() / 8
    own_b = torch.randn(96, 4, generator=generator).bfloat16()
    a[0][1, 0].copy_(own_a)
    views[0][1, 0].copy_(own_b)
    y = served.forward(x, ids, None)
    right = base[0].float() + own_b.float() @ (own_a.float() @ x[0].float())
    torch.testing.assert_close(y[0].float(), right, rtol=2**-6, atol=2**-6)
    assert torch.equal(y[1:], base[1:])
    assert torch.equal(served.forward(x, none, None), base)
    torch.testing.assert_close(served.add_adapters(base, x, ids), y, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("symmetric", [pytest.param(True, marks=pytest.mark.nightly), False])
def test_within_a_graph_nothing_depends_on_the_number_of_tokens(
    symmetric, lora, tmp_path, monkeypatch
):
    """VLLM traces its model once for any number of tokens, and drops the guards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a kept graph has its own guards
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(96, 128, generator=generator).bfloat16()
    served = ServedLayer("layer", ServedEngine(Options(in_graph="inlined")))
    served.hold(prepare(quantize(dense, group_size=32, symmetric=symmetric)))
    served.lora = lora
    for slice_ in lora.slices:
        slice_.a.normal_(generator=generator)
        slice_.bt.normal_(generator=generator)
    whole = _own_code(lambda x, ids: served.forward(x, ids, None), symmetric)
    base = _own_code(lambda x: served.forward(x, None, None), symmetric)
    traced, plain = (torch.compile(function, fullgraph=True) for function in (whole, base))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (100, 40, 17, 5, 2):
            x = torch.randn(tokens, 128, generator=generator).bfloat16()
            ids = torch.arange(tokens) % 4 - 1
            torch._dynamo.mark_dynamic(x, 0, min=2, max=8192)
            torch._dynamo.mark_dynamic(ids, 0, min=2, max=8192)
            y = traced(x, ids)
            right = served.forward(x.clone(), ids.clone(), None)
            torch.testing.assert_close(y, right, rtol=0.02, atol=0.5)
            other = torch.randn(tokens, 128, generator=generator).bfloat16()
            torch._dynamo.mark_dynamic(other, 0, min=2, max=8192)
            torch.testing.assert_close(
                plain(other), served.forward(other.clone(), None, None), rtol=0.02, atol=0.5
            )


def test_plain_adapters_are_those_of_the_compiled_path(weight, lora):
    """Layers whose compiled adapters failed the check use them."""
    generator = torch.Generator().manual_seed(0)
    served = ServedLayer("layer", lora=lora)
    for slice_ in lora.slices:
        slice_.a.normal_(generator=generator)
        slice_.bt.normal_(generator=generator)
    x = torch.randn(6, 128, generator=generator).bfloat16()
    base = torch.randn(6, 96, generator=generator).bfloat16()
    ids = torch.tensor([0, -1, 2, 1, 9, 0])  # 9 is no slot
    lora_a = [slice_.a.unsqueeze(1) for slice_ in lora.slices]
    lora_b = [slice_.bt.transpose(1, 2).unsqueeze(1) for slice_ in lora.slices]
    y = add_eagerly(base, x, ids, lora_a, lora_b)
    torch.testing.assert_close(y, served.add_adapters(base, x, ids), rtol=0.01, atol=0.05)
    assert torch.equal(y[[1, 4]], base[[1, 4]])
