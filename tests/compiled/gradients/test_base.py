"""The gradient of x through the base: of every layout, against float64, compiled and not."""

import pytest
import torch

from int4_lora.compiled import prepare, products
from int4_lora.compiled.gradients import base
from int4_lora.compiled.gradients.base import through_base
from int4_lora.compiled.gradients.plan import plan_gradient
from int4_lora.compiled.layouts.int4pack import block_rows
from support.gradients import bounds, of_reference, rms
from support.weights import random_weight, random_x

pytestmark = pytest.mark.versions

WIDE = {"rows": 208, "columns": 256}  # of torch's blocks: three of 64 rows, and a rest
WEIGHTS = {  # layout and arguments of random_weight
    "int4pack group 32": ("int4pack", {**WIDE, "groups": 8}),
    "int4pack group 128": ("int4pack", {**WIDE, "groups": 2}),
    "int4pack channel": ("int4pack", {**WIDE, "layout": "channel"}),
    "int4pack whole blocks": ("int4pack", {**WIDE, "rows": 128}),
    "int4pack without a block": ("int4pack", {**WIDE, "rows": 16}),
    "interleaved": ("interleaved", {**WIDE, "rows": 61, "groups": 2}),
    "interleaved asymmetric": ("interleaved", {**WIDE, "rows": 61, "symmetric": False}),
    "interleaved g_idx": ("interleaved", {**WIDE, "layout": "g_idx", "symmetric": False}),
    "interleaved channel": ("interleaved", {**WIDE, "layout": "channel", "symmetric": False}),
    "int8": ("int8", {**WIDE, "bits": 8}),
    "int8 g_idx": ("int8", {**WIDE, "rows": 61, "bits": 8, "layout": "g_idx", "symmetric": False}),
    "int8 channel": ("int8", {"bits": 8, "layout": "channel", "symmetric": False}),
    "checkpoint odd": ("checkpoint", {"symmetric": False}),
    "checkpoint g_idx": ("checkpoint", {"layout": "g_idx_unbalanced"}),
    "checkpoint block": ("checkpoint", {"layout": "block", "symmetric": False}),
    "checkpoint 8 bits": ("checkpoint", {"bits": 8}),
}
DTYPES = [  # of g, of the scales
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.bfloat16),
]


def case(name, scales, tokens, dtype):
    """Return the weight, the same laid out, and g."""
    layout, arguments = WEIGHTS[name]
    if layout == "int4pack" and block_rows() is None:
        pytest.skip("a CPU whose layout is not known")
    weight = random_weight(**{"dtype": scales, **arguments})
    g = random_x(tokens, weight.out_features, dtype, seed=tokens)
    return weight, prepare(weight, layout=layout), g


def check(found, weight, g):
    """Check against float64: float32 by its bound, 16 bits by the rms of the eager reference."""
    x = torch.zeros(g.shape[0], weight.in_features, dtype=g.dtype)
    (exact,) = of_reference(x, weight, None, None, g, torch.float64)
    assert found.shape == x.shape
    assert found.dtype == g.dtype
    if g.dtype == torch.float64:
        assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)
    elif g.dtype == torch.float32:
        (bound,) = bounds(x, weight, None, None, g)
        assert ((found.double() - exact).abs() <= bound).all()
    else:
        (usual,) = of_reference(x, weight, None, None, g)
        assert rms(found, exact) <= 2 * rms(usual, exact)


@pytest.mark.parametrize(("dtype", "scales"), DTYPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("slow", [(), (torch.bfloat16,)], ids=str)  # two kinds of CPU
def test_every_layout(slow, name, dtype, scales, monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", slow)
    for tokens in (1, 7):
        weight, prepared, g = case(name, scales, tokens, dtype)
        check(through_base(g, prepared, g.dtype), weight, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["int4pack group 32", "interleaved g_idx", "int8 g_idx", "checkpoint odd"]
)
def test_compiled(name, dtype):
    """Scales in 16 bits: Inductor omits casts, so that the rounding of W shows."""
    weight, prepared, g = case(name, torch.bfloat16, 40, dtype)
    entry = plan_gradient(g, prepared, dtype)
    check(entry(g), weight, g)
    for tokens in (25, 33):
        weight, prepared, g = case(name, torch.bfloat16, tokens, dtype)
        check(plan_gradient(g, prepared, dtype)(g), weight, g)


@pytest.mark.parametrize(
    "name", ["int4pack group 32", "interleaved g_idx", "int8 g_idx", "checkpoint odd"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_several_blocks_of_rows(name, dtype, monkeypatch):
    weight, prepared, g = case(name, dtype, 7, dtype)
    for rows in (1, 70, 130):
        monkeypatch.setattr(base, "BLOCK_BYTES", rows * weight.in_features * dtype.itemsize)
        check(through_base(g, prepared, dtype), weight, g)


def test_partial_sums_are_kept_in_float32(monkeypatch):
    """256 and then seven times 1: added in bfloat16, each 1 would be rounded away."""
    monkeypatch.setattr(products, "SLOW_ON_CPU", ())
    monkeypatch.setattr(base, "BLOCK_BYTES", 1)
    weight = random_weight(rows=64, columns=64, groups=1, dtype=torch.bfloat16)
    weight.packed.fill_(0x11111111 - 2**32 * (0x11111111 >> 31))
    weight.scale.fill_(-0.125)  # (1 - 8) * -0.125
    g = torch.zeros(1, 64, dtype=torch.bfloat16)
    g[0, ::8] = torch.tensor([256.0, *[1.0] * 7])
    found = through_base(g, prepare(weight, layout="interleaved"), torch.float32)
    assert torch.equal(found, torch.full((1, 64), 263 * 0.875))
