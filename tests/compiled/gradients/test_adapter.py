"""The gradients of adapters, and of x through them, against float64, compiled and not."""

import pytest
import torch

from int4_lora.compiled import prepare, prepare_lora
from int4_lora.compiled.gradients import differentiable
from int4_lora.reference import LoRAStack
from support.gradients import NAMES, bounds, leaves_of, of_reference, rms
from support.weights import random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

SHAPE = {"rows": 48, "columns": 128}


def gradients(x, weight, stack, ids, g, *, compiled):
    """Return the gradients of x, a, b and scaling; the forward is left out."""
    x, *rest = leaves_of(x, stack)
    lora = prepare_lora(LoRAStack(*rest))
    y = differentiable(lambda *_: torch.zeros_like(g), x, prepare(weight), lora.slices, ids, None)
    # a backward that can be differentiated again runs uncompiled
    return torch.autograd.grad(y, [x, *rest], g, create_graph=not compiled)


def case(adapters, rank, tokens, dtype):
    weight = random_weight(**SHAPE, dtype=dtype)
    scalings = [(-1) ** index * (index + 0.5) for index in range(adapters)]
    stack = random_stack(**SHAPE, adapters=adapters, rank=rank, dtype=dtype, scalings=scalings)
    ids = torch.arange(tokens) * 7 % (adapters + 1) - 1
    return random_x(tokens, 128, dtype), weight, stack, ids, random_x(tokens, 48, dtype, seed=4)


def check(found, operands):
    exact = of_reference(*operands, torch.float64)
    usual = of_reference(*operands)
    for name, mine, theirs, right, bound in zip(
        NAMES, found, usual, exact, bounds(*operands), strict=True
    ):
        assert mine.shape == right.shape, name
        assert mine.dtype == theirs.dtype, name
        if operands[0].dtype == torch.float32:
            assert ((mine.double() - right).abs() <= bound).all(), name
        elif name != "scaling":  # too few for a mean
            assert rms(mine, right) <= 2 * rms(theirs, right), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize(("adapters", "rank"), [(1, 1), (1, 16), (3, 4), (5, 65)])
def test_ranks_and_adapters(adapters, rank, tokens, dtype):
    operands = case(adapters, rank, tokens, dtype)
    check(gradients(*operands, compiled=False), operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    for tokens in (25, 40):
        for adapters in (1, 3):
            operands = case(adapters, 16, tokens, dtype)
            check(gradients(*operands, compiled=True), operands)


def test_adapters_share_a_graph(monkeypatch):
    from int4_lora.compiled.graphs import cache as graphs

    monkeypatch.setattr(graphs, "_graphs", {})
    operands = case(3, 16, 40, torch.float32)
    gradients(*operands, compiled=True)
    kinds = [key[0][0] for key in graphs._graphs]
    assert sorted(kinds) == ["adapter gradients", "decoded"]
    assert all(graph.direct is not None for graph in graphs._graphs.values())


def test_ids_of_no_adapter():
    x, weight, stack, _, g = case(2, 4, 5, torch.float32)
    ids = torch.tensor([2, -1, -7, 2**40, 99])
    found = gradients(x, weight, stack, ids, g, compiled=False)
    exact = of_reference(x, weight, stack, torch.full((5,), -1), g, torch.float64)
    assert torch.allclose(found[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    assert not any(one.any() for one in found[1:])


def test_no_tokens():
    operands = case(2, 4, 0, torch.bfloat16)
    for mine, usual in zip(
        gradients(*operands, compiled=True), of_reference(*operands), strict=True
    ):
        assert torch.equal(mine, usual)
        assert mine.dtype == usual.dtype


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("spoiled", ["x", "g", "a", "b"])
def test_a_nan_stays_with_its_own_tokens_and_adapter(spoiled, compiled):
    x, weight, stack, _, g = case(3, 4, 4, torch.float32)
    ids = torch.tensor([0, 1, 2, -1])
    if spoiled in ("x", "g"):
        (x if spoiled == "x" else g)[1] = torch.nan
        (x if spoiled == "x" else g)[3] = torch.nan
    else:
        getattr(stack, spoiled)[1] = torch.nan
    of_x, *rest = gradients(x, weight, stack, ids, g, compiled=compiled)
    others = [0, 2] if spoiled == "g" else [0, 2, 3]
    assert of_x[others].isfinite().all()
    for gradient in rest:
        assert gradient[[0, 2]].isfinite().all()
        assert gradient[[0, 2]].any()
    assert any(gradient[1].isnan().any() for gradient in rest)
