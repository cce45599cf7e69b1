"""Adapters added to a base that another kernel computed, against the reference in float64."""

import pytest
import torch

from int4_lora.compiled import add_lora, prepare_lora
from int4_lora.reference import (
    LoRASlice,
    LoRAStack,
    PackedWeight,
    error_bound,
    expand,
    int4_lora_linear,
    shrink,
)

pytestmark = pytest.mark.versions

OUT, IN = 48, 64


def stack(out, seed, rank=5, adapters=3, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(adapters, rank, IN, generator=generator).to(dtype) / 8
    b = torch.randn(adapters, out, rank, generator=generator).to(dtype)
    return LoRAStack(a, b, torch.tensor([0.5, 2.0, 1.5][:adapters]))


@pytest.mark.parametrize("tokens", [0, 1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_within_the_bound_of_its_roundings(tokens, dtype):
    slices = [LoRASlice(stack(16, 1, dtype=dtype), 0), LoRASlice(stack(24, 2, dtype=dtype), 24)]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, IN, generator=generator).to(dtype)
    base = torch.randn(tokens, OUT, generator=generator).to(dtype)
    before = base.clone()
    ids = torch.randint(-1, 3, (tokens,), generator=generator)
    y = add_lora(base, x, prepare_lora(slices), ids)
    words = torch.full((OUT, IN // 8), -2004318072, dtype=torch.int32)  # 0x88888888: zeros
    zero = PackedWeight(words, torch.ones(OUT, 1), (OUT, IN))
    exact = base.double() + int4_lora_linear(x.double(), zero, slices, ids)
    bound = error_bound(x, zero, slices, ids) + exact.abs() * torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()
    assert torch.equal(y[ids < 0], before[ids < 0])
    assert torch.equal(base, before)


def test_inside_somebody_elses_graph():
    lora, x, base = prepare_lora(stack(OUT, 1)), torch.randn(4, IN).bfloat16(), torch.zeros(4, OUT)
    ids = torch.tensor([0, -1, 2, 1])
    own = torch.compile(lambda y: 2 * add_lora(y, x, lora, ids), fullgraph=True)
    right = 2 * add_lora(base.bfloat16(), x, lora, ids)
    torch.testing.assert_close(own(base.bfloat16()), right, rtol=2**-7, atol=2**-7)


OVERLAPPING = prepare_lora([LoRASlice(stack(16, 1), 0), LoRASlice(stack(16, 1), 8)])
WIDE = prepare_lora(stack(OUT, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": torch.zeros(2, OUT)}, TypeError, "base must be bfloat16, got float32"),
        ({"base": torch.zeros(2, 47).bfloat16()}, ValueError, r"outputs of .0, 47., got .0, 48."),
        ({"base": torch.zeros(3, OUT).bfloat16()}, ValueError, "base must be"),
        ({"x": torch.zeros(2, 63).bfloat16()}, ValueError, "the in_features of x, 63"),
        ({"adapter_ids": torch.zeros(2)}, TypeError, "adapter_ids must be int32 or int64"),
        ({"adapter_ids": torch.zeros(3, dtype=torch.int32)}, ValueError, "adapter_ids must be"),
        (
            {"x": torch.zeros(2, IN, device="meta").bfloat16()},
            ValueError,
            "base is on cpu, x is on meta",
        ),
        ({"lora": OVERLAPPING}, ValueError, "slices must not overlap"),
        ({"lora": WIDE}, TypeError, "must not be float64"),
        ({"lora": stack(OUT, 1)}, TypeError, "lora must be a PreparedLoRA, got LoRAStack"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, message):
    operands = {
        "base": torch.zeros(2, OUT).bfloat16(),
        "x": torch.zeros(2, IN).bfloat16(),
        "lora": prepare_lora(stack(OUT, 1)),
        "adapter_ids": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        add_lora(**{**operands, **changes})


def test_autocast_changes_nothing():
    lora = prepare_lora(stack(OUT, 1, rank=65, dtype=torch.float32))
    x, base, ids = torch.randn(40, IN), torch.randn(40, OUT), torch.arange(40) % 4 - 1
    y = add_lora(base, x, lora, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(add_lora(base, x, lora, ids), y)


@pytest.mark.parametrize("tokens", [0, 3])
def test_gradients(tokens):
    x = torch.randn(tokens, IN, requires_grad=True)
    base = torch.randn(tokens, OUT, requires_grad=True)
    given = stack(OUT, 1, dtype=torch.float32)
    a, b = given.a.requires_grad_(), given.b.requires_grad_()
    ids = torch.tensor([0, 2, -1])[:tokens]
    y = add_lora(base, x, prepare_lora(LoRAStack(a, b, given.scaling)), ids)
    weights = torch.randn(tokens, OUT)
    found = torch.autograd.grad((y * weights).sum(), (base, x, a, b))
    words = torch.full((OUT, IN // 8), -2004318072, dtype=torch.int32)
    zero = PackedWeight(words, torch.ones(OUT, 1), (OUT, IN))
    right = base + int4_lora_linear(x, zero, LoRAStack(a, b, given.scaling), ids)
    for one, other in zip(
        found, torch.autograd.grad((right * weights).sum(), (base, x, a, b)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_no_token_is_no_alias():
    base = torch.zeros(0, OUT).bfloat16()
    x, ids = torch.zeros(0, IN).bfloat16(), torch.zeros(0, dtype=torch.int64)
    assert add_lora(base, x, prepare_lora(stack(OUT, 1)), ids) is not base


@pytest.mark.parametrize("rank", [pytest.param(64, marks=pytest.mark.nightly), 65, 128])
def test_large_ranks_at_both_ends_of_each_bucket(rank):
    """The adapters' term must be the same within a bucket, because one graph serves the bucket."""
    generator = torch.Generator().manual_seed(0)
    adapters = stack(OUT, 5, rank=rank)
    for tokens in (1, 2, 16, 17, 24, 25, 40):
        x = torch.randn(tokens, IN, generator=generator).bfloat16()
        base = torch.randn(tokens, OUT, generator=generator).bfloat16()
        ids = torch.arange(tokens) % 4 - 1
        found = add_lora(base, x, prepare_lora(adapters), ids)
        delta = expand(shrink(x.double(), adapters, ids), adapters, ids)
        exact = base.double() + delta
        assert (found.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
        assert torch.equal(found[ids < 0], base[ids < 0])
