"""Gradients of the compiled layer: those of the reference, without keeping a dense weight."""

import weakref

import pytest
import torch
from packaging.version import Version

from int4_lora.compiled import PreparedLoRA, int4_lora_linear, prepare, prepare_lora, products
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.graphs import cache as graphs
from int4_lora.reference import LoRASlice, LoRAStack
from int4_lora.reference import int4_lora_linear as reference
from support.weights import random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

SHAPE = {"rows": 48, "columns": 128}
BITS = {"int8": 8}  # of the layouts that do not hold 4


def leaves(dtype, tokens):
    """Return x, a, b, scaling and bias, each of which requires a gradient."""
    stack = random_stack(**SHAPE, dtype=dtype)
    tensors = (random_x(tokens, 128, dtype), stack.a, stack.b, stack.scaling.to(dtype),
               torch.linspace(-1, 1, 48, dtype=dtype))  # fmt: skip
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("layout", ["interleaved", "int8", "checkpoint"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_gradients_are_the_references(layout, tokens):
    weight = random_weight("g_idx", **SHAPE, symmetric=False, bits=BITS.get(layout, 4))
    ids = torch.arange(tokens) % 4 - 1
    target = random_x(tokens, 48, torch.float64, seed=5)
    found = []
    for compiled in (True, False):
        x, a, b, scaling, bias = leaves(torch.float64, tokens)
        stack = LoRAStack(a, b, scaling)
        if compiled:
            prepared = prepare(weight, layout=layout)
            y = int4_lora_linear(x, prepared, prepare_lora(stack), ids, bias)
        else:
            y = reference(x, weight, stack, ids, bias)
        (y * target).sum().backward()
        found.append((x.grad, a.grad, b.grad, scaling.grad, bias.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_slices_and_a_frozen_x():
    weight = random_weight(**SHAPE)
    _, a, b, scaling, _ = leaves(torch.float32, 3)
    ids = torch.tensor([0, -1, 2])
    x = random_x(3, 128)
    found = []
    for compiled in (True, False):
        for leaf in (a, b, scaling):
            leaf.grad = None
        lora = [LoRASlice(LoRAStack(a, b[:, :16], scaling), 0),
                LoRASlice(LoRAStack(a, b[:, 16:], scaling), 16)]  # fmt: skip
        if compiled:
            y = int4_lora_linear(x, prepare(weight), prepare_lora(lora), ids)
        else:
            y = reference(x, weight, lora, ids)
        y.square().sum().backward()
        found.append((a.grad, b.grad, scaling.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_no_gradient_leaks_between_adapters():
    weight = random_weight(**SHAPE)
    x, a, b, scaling, _ = leaves(torch.float32, 4)
    with torch.no_grad():
        a[1] = torch.nan
    lora = prepare_lora(LoRAStack(a, b, scaling))
    int4_lora_linear(x, prepare(weight), lora, torch.tensor([0, 1, 2, -1])).sum().backward()
    assert x.grad[1].isnan().all()
    assert x.grad[[0, 2, 3]].isfinite().all()
    assert b.grad[[0, 2]].isfinite().all()


def test_nothing_of_the_weights_size_is_kept_for_the_backward():
    weight = prepare(random_weight(**SHAPE))
    x, a, b, scaling, bias = leaves(torch.float32, 4)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora = prepare_lora(LoRAStack(a, b, scaling))
        y = int4_lora_linear(x, weight, lora, torch.tensor([0, 1, 2, -1]), bias)
    assert kept
    assert max(kept) < 48 * 128
    node = weakref.ref(y.grad_fn)
    del y
    assert node() is None


def test_x_is_kept_only_where_an_adapter_needs_it():
    weight = prepare(random_weight(**SHAPE))
    x, a, b, scaling, _ = leaves(torch.float32, 4)
    ids = torch.tensor([0, 1, 2, -1])
    frozen = LoRAStack(a.detach(), b.detach(), scaling.detach())
    for stack, kept_x in ((None, 0), (frozen, 0), (LoRAStack(a, b, scaling), 1)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
            lora = None if stack is None else prepare_lora(stack)
            int4_lora_linear(x, weight, lora, None if stack is None else ids)
        assert sum(one.shape == x.shape for one in kept) == kept_x


def test_the_backward_can_be_differentiated():
    weight = random_weight(**SHAPE)
    ids = torch.arange(20) % 4 - 1
    found = []
    for compiled in (True, False):
        x, a, b, scaling, _ = leaves(torch.float64, 20)
        if compiled:
            y = int4_lora_linear(x, prepare(weight), prepare_lora(LoRAStack(a, b, scaling)), ids)
        else:
            y = reference(x, weight, LoRAStack(a, b, scaling), ids)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, a, b, scaling)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize("layout", ["int4pack", "interleaved", "int8", "checkpoint"])
def test_the_backward_becomes_part_of_another_graph(layout):
    if layout == "checkpoint" and Version(torch.__version__) < Version("2.11"):
        pytest.skip("torch < 2.11 rebuilds PackedWeight with one field too many")
    weight = prepare(random_weight(**SHAPE, bits=BITS.get(layout, 4)), layout=layout)
    operands = leaves(torch.float32, 4)
    ids = torch.tensor([0, 1, 2, -1])

    def layer(x, a, b, scaling, bias):
        slices = (PreparedSlice(a, b.transpose(1, 2).contiguous(), scaling, 0),)
        return int4_lora_linear(x.relu(), weight, PreparedLoRA(slices), ids, bias).square()

    found = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        found.append(torch.autograd.grad(function(*operands).sum(), operands))
    for alone, within in zip(*found, strict=True):
        torch.testing.assert_close(alone, within, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "kinds"),
    [(torch.float32, ["decoded"]), (torch.bfloat16, ["gradient", "tiles"])],
)
def test_one_graph_serves_all_numbers_of_tokens_of_a_bucket(dtype, kinds, monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", ())
    monkeypatch.setattr(graphs, "_graphs", {})
    weight = prepare(random_weight(**SHAPE, dtype=dtype))
    for tokens in (30, 40, 50):
        x = random_x(tokens, 128, dtype).requires_grad_()
        int4_lora_linear(x, weight).sum().backward()
    assert sorted(key[0][0] for key in graphs._graphs) == kinds
    assert all(graph.direct is not None for graph in graphs._graphs.values())


def test_no_gradients_where_none_are_wanted():
    weight = prepare(random_weight(**SHAPE))
    x, *_ = leaves(torch.float32, 3)
    with torch.no_grad():
        assert not int4_lora_linear(x, weight).requires_grad
    assert not int4_lora_linear(x.detach(), weight).requires_grad


def test_autocast_around_the_backward_changes_nothing():
    weight = prepare(random_weight(**SHAPE))
    found = []
    for enabled in (False, True):
        x, a, b, scaling, bias = leaves(torch.float32, 4)
        lora = prepare_lora(LoRAStack(a, b, scaling))
        y = int4_lora_linear(x, weight, lora, torch.tensor([0, 1, 2, -1]), bias)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(y, (x, a, b), torch.ones_like(y)))
    for plain, within in zip(*found, strict=True):
        assert torch.equal(plain, within)
