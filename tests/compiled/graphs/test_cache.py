"""The cache of graphs: a layer of other sizes, strides or tensors gets a graph of its own.

Dynamo's guards on operands are removed: a difference that the key misses would run a wrong graph.
"""

import dataclasses

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import free_symbols

from int4_lora import reference
from int4_lora.compiled import PreparedLoRA, int4_linear, int4_lora_linear, prepare, prepare_lora
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.formulations import GEMV, INT4PACK
from int4_lora.compiled.graphs import cache as graphs
from int4_lora.compiled.graphs.entry import plan
from int4_lora.reference import LoRAStack, quantize
from support.weights import random_weight

pytestmark = pytest.mark.versions


def symbols_of(in_features, out_features, tokens=5):
    """Trace a layer; return the symbols in the sizes of each input of its graph."""
    found, kept = [], dict(graphs._graphs)

    def backend(graph, inputs):
        for node in graph.graph.find_nodes(op="placeholder"):
            value = node.meta["example_value"]
            if isinstance(value, torch.Tensor):
                found.append({str(one) for size in value.shape for one in free_symbols(size)})
        return graph.forward

    formulation = dataclasses.replace(INT4PACK, backend=lambda weight, bucket: backend)
    generator = torch.Generator().manual_seed(in_features)
    dense = torch.randn(out_features, in_features, generator=generator)
    weight = prepare(quantize(dense.bfloat16(), group_size=32))
    a, b = torch.randn(2, in_features).bfloat16(), torch.randn(out_features, 2).bfloat16()
    lora = prepare_lora(LoRAStack.stack([(a, b, 1.0), (a, b, 0.5)]))
    x = torch.randn(tokens, in_features, dtype=torch.bfloat16)
    ids = torch.zeros(tokens, dtype=torch.int64)
    graphs._graphs.clear()
    try:
        plan(x, weight, lora.slices, ids, formulation=formulation)(x, ids)
    finally:
        graphs._graphs.clear()
        graphs._graphs.update(kept)
    return found


def test_only_the_number_of_tokens_is_a_symbol_in_every_layer():
    for in_features, out_features in ((64, 32), (128, 48), (96, 80)):
        symbols = symbols_of(in_features, out_features)
        assert symbols, "nothing was traced"
        assert len(set().union(*symbols)) == 1  # x and adapter_ids share it
        assert sum(map(bool, symbols)) == 2


def test_tensors_that_were_one_and_then_are_not_get_a_graph_of_their_own():
    """Without guards, a graph traced with the same tensor in two places reads only the first."""
    weight = prepare(quantize(torch.randn(32, 64), group_size=32))
    x, ids = torch.randn(3, 64), torch.tensor([0, 1, -1])
    shared = torch.randn(2, 2, 64)
    bt, scaling = torch.randn(2, 2, 16), torch.ones(2)
    same = PreparedLoRA(
        (PreparedSlice(shared, bt, scaling, 0), PreparedSlice(shared, bt, scaling, 16))
    )
    other = PreparedLoRA(
        (
            PreparedSlice(shared, bt, scaling, 0),
            PreparedSlice(torch.randn(2, 2, 64), torch.randn(2, 2, 16), torch.ones(2), 16),
        )
    )
    for lora in (same, other):
        y = int4_lora_linear(x, weight, lora, ids)
        base = int4_lora_linear(x, weight)
        for one in lora.slices:
            h = torch.stack([one.a[max(i, 0)] @ row for i, row in zip(ids, x, strict=True)])
            delta = torch.stack(
                [row @ one.bt[max(i, 0)] * (i >= 0) for i, row in zip(ids, h, strict=True)]
            )
            torch.testing.assert_close(
                y[:, one.start : one.stop], base[:, one.start : one.stop] + delta
            )


def strided(tensor):
    """Return the same numbers with other strides: the first dimension is the inner one."""
    if tensor.ndim == 1:
        return tensor.repeat_interleave(2)[::2]
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("order", ["as it is first", "strided first"])
@pytest.mark.parametrize("operand", ["x", "ids", "bias", "a", "bt", "scaling", "scale", "packed"])
def test_other_strides_give_the_same_numbers(operand, order):
    generator = torch.Generator().manual_seed(len(operand))
    rows, columns, groups = 24, 128, 32 if operand == "packed" else 4  # 32: checkpoint's layout
    weight = random_weight(rows=rows, columns=columns, groups=groups, seed=1)
    given = {
        "x": torch.randn(3, columns, generator=generator),
        "ids": torch.tensor([1, -1, 0]),
        "bias": torch.randn(rows, generator=generator),
        "a": torch.randn(2, 3, columns, generator=generator),
        "bt": torch.randn(2, 3, rows, generator=generator),
        "scaling": torch.tensor([0.5, 2.0]),
        "scale": weight.scale,
        "packed": weight.packed,
    }
    both = [given, {**given, operand: strided(given[operand])}]
    for one in both if order == "as it is first" else both[::-1]:
        own = dataclasses.replace(weight, scale=one["scale"], packed=one["packed"])
        lora = PreparedLoRA((PreparedSlice(one["a"], one["bt"], one["scaling"], 0),))
        y = int4_lora_linear(one["x"], prepare(own), lora, one["ids"], one["bias"])
        stack = LoRAStack(one["a"], one["bt"].transpose(1, 2), one["scaling"])
        right = reference.int4_lora_linear(
            one["x"].double(), own, stack, one["ids"], one["bias"].double()
        )
        bound = reference.error_bound(
            one["x"], own, stack, one["ids"], one["bias"], weight_rounded=False, base_rounded=True
        )
        assert ((y.double() - right).abs() <= bound).all()


def test_a_scaling_that_is_the_weights_scale_and_then_is_not():
    scale = torch.tensor([0.05])
    weight = dataclasses.replace(random_weight("tensor"), scale=scale)
    prepared, ids = prepare(weight), torch.tensor([0, 0, -1])
    a, bt = torch.randn(1, 4, weight.shape[1]), torch.randn(1, 4, weight.shape[0])
    x = torch.randn(3, weight.shape[1])
    for scaling in (scale, torch.tensor([3.0])):
        lora = PreparedLoRA((PreparedSlice(a, bt, scaling, 0),))
        y = int4_lora_linear(x, prepared, lora, ids)
        stack = LoRAStack(a, bt.transpose(1, 2), scaling)
        right = reference.int4_lora_linear(x.double(), weight, stack, ids)
        torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)


def test_a_layer_with_and_without_a_bias_and_of_another_dtype(monkeypatch):
    monkeypatch.setattr(graphs, "_graphs", {})
    eager = dataclasses.replace(GEMV, backend=lambda weight, bucket: lambda graph, _: graph.forward)
    weight, x = random_weight(rows=48, columns=128), torch.randn(3, 128)
    prepared, base = prepare(weight), reference.int4_linear(x.double(), weight)
    bias = torch.linspace(-1, 1, 48)
    for given in (None, bias, bias.bfloat16()):
        y = plan(x, prepared, bias=given, formulation=eager)(x, None)
        right = base if given is None else base + given.double()
        torch.testing.assert_close(y.double(), right, rtol=1e-4, atol=1e-4)
    assert len(graphs._graphs) == 3


def test_modes_are_still_guarded():
    weight = random_weight(rows=48, columns=128)
    prepared, x = prepare(weight), torch.randn(2, 3, 128)
    alone = torch.stack([int4_linear(one, prepared) for one in x])
    torch.testing.assert_close(torch.vmap(lambda one: int4_linear(one, prepared))(x), alone)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int4_linear(x[0], prepared), alone[0])


def test_negative_bits():
    weight = random_weight(rows=48, columns=128)
    x, bias = torch.randn(3, 128), torch.randn(48)
    flipped = torch._neg_view(x), torch._neg_view(bias)
    y = int4_linear(flipped[0], prepare(weight), flipped[1])
    torch.testing.assert_close(y, int4_linear(-x, prepare(weight), -bias))


def test_a_nan_that_comes_with_update_stays_with_its_adapter():
    weight = prepare(random_weight(rows=48, columns=128))
    a, b = torch.randn(3, 65, 128), torch.randn(3, 48, 65)  # 65: not gathered
    lora = prepare_lora(LoRAStack(a, b, torch.ones(3)))
    x, ids = torch.randn(40, 128), torch.arange(40) % 4 - 1
    before = int4_lora_linear(x, weight, lora, ids)
    lora.update(1, [(a[1], b[1].index_fill(0, torch.tensor([0]), float("nan")), 1.0)])
    after = int4_lora_linear(x, weight, lora, ids)
    assert after[ids == 1, 0].isnan().all()
    torch.testing.assert_close(after[ids != 1], before[ids != 1])
