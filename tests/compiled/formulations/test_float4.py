"""Layers with FP4 weights: every formulation that takes them, and their gradients.

Uncompiled on all dtypes; compiled where torch.compile may omit a rounding.
"""

import itertools
import math
import re

import pytest
import torch
from packaging.version import Version
from torch._inductor.utils import run_and_get_code

from int4_lora.compiled import formulation_for, int4_lora_linear, layouts, prepare, prepare_lora
from int4_lora.compiled.formulations import DEFINITION, FORMULATIONS, GEMV, TILES
from int4_lora.compiled.gradients.base import through_base
from int4_lora.reference import dequantize, error_bound
from int4_lora.reference import int4_lora_linear as exactly
from support.gradients import rms
from support.weights import random_float4, random_stack, random_x

pytestmark = pytest.mark.versions

FORMATS = ("nvfp4", "mxfp4")
ROWS, COLUMNS = 48, 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(y, formulation, weight, x, stack=None, ids=None, bias=None):
    """Check a result against the bound of its formulation."""
    exact = exactly(x.double(), weight, stack, ids, bias)
    flags = (formulation.weight_rounded, formulation.base_rounded)
    bound = error_bound(x, weight, stack, ids, bias, weight_rounded=flags[0], base_rounded=flags[1])
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_formulation(name, dtype):
    weight = random_float4(name, rows=ROWS, columns=COLUMNS)
    stack, bias = random_stack(rows=ROWS, columns=COLUMNS), torch.linspace(-1, 1, ROWS)
    slices, ran = prepare_lora(stack).slices, set()
    for tokens, layout in itertools.product((1, 3, 17), layouts(weight)):
        prepared = prepare(weight, layout=layout)
        x, ids = random_x(tokens, COLUMNS, dtype), torch.arange(tokens) % 4 - 1
        for formulation in FORMULATIONS.values():
            if formulation.refuses(prepared, dtype, tokens) is None:
                y = formulation.layer(x, prepared, slices, ids, bias)
                check(y, formulation, weight, x, stack, ids, bias)
                ran.add((formulation.name, layout))
    assert ran == {("gemv", "float4"), ("tiles", "float4"), ("tiles", "checkpoint")}


def test_which_formulation_is_the_default():
    wide, narrow = (random_float4(columns=columns) for columns in (256, 64))
    chosen = [formulation_for(prepare(wide), torch.bfloat16, n).name for n in (1, 4, 5, 256)]
    assert chosen == ["gemv", "gemv", "tiles", "tiles"]
    chosen = [formulation_for(prepare(narrow), torch.bfloat16, n).name for n in (1, 24, 25)]
    assert chosen == ["tiles", "tiles", "tiles"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("where", ["scale", "global_scale"])
def test_a_scale_that_is_no_number_reaches_its_own_outputs_only(name, where):
    weight = random_float4(name, rows=ROWS, columns=COLUMNS)
    x = random_x(3, COLUMNS)
    bad = torch.zeros(ROWS, dtype=torch.bool)
    if where == "scale":
        weight.scale.view(torch.uint8)[5, 3] = 0x7F if name == "nvfp4" else 255
        bad[5] = True
    elif name == "nvfp4":
        weight.global_scale.fill_(torch.nan)
        bad[:] = True
    for layout in layouts(weight):
        prepared = prepare(weight, layout=layout)
        for formulation in (GEMV, TILES):
            if formulation.refuses(prepared, x.dtype, 3) is None:
                y = formulation.layer(x, prepared, (), None, None)
                assert torch.equal(y.isnan(), bad.expand(3, -1)), formulation.name


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("nvfp4", 1), pytest.param("mxfp4", 2, marks=pytest.mark.nightly), ("nvfp4", 40)],
)
def test_compiled(name, tokens):
    """In float32 the rounding of W that Inductor might omit is far above the bound of tiles."""
    weight = random_float4(name, rows=208, columns=COLUMNS)
    prepared, stack = prepare(weight), random_stack(rows=208, columns=COLUMNS)
    lora, ids = prepare_lora(stack), torch.arange(tokens) % 4 - 1
    for dtype in (torch.bfloat16, torch.float32) if tokens > 2 else (torch.bfloat16,):
        x = random_x(tokens, COLUMNS, dtype)
        used = formulation_for(prepared, dtype, tokens, lora)
        assert used.name == ("gemv" if tokens <= 4 else "tiles")
        y = int4_lora_linear(x, prepared, lora, ids)
        check(y, used, weight, x, stack, ids)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="Inductor of torch 2.8 stores the products of MXFP4; 2.9 to 2.12 were not tried",
)
@pytest.mark.parametrize("name", FORMATS)
def test_a_compiled_gemv_stores_no_products(name):
    """A sum of many parts would be stored for each word before it is reduced."""
    weight, x = prepare(random_float4(name, rows=208, columns=1024)), random_x(1, 1024)
    with torch.inference_mode():
        compiled = torch.compile(lambda x: GEMV.base(x, weight))
        _, (code, *others) = run_and_get_code(compiled, x)
    sizes = [
        math.prod(int(size) for size in re.findall(r"\d+", shape))
        for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    ]
    assert others == []
    assert max(sizes) == 208


def test_tiles_round_a_weight_in_the_layout_of_the_checkpoint():
    """A graph may omit the rounding of the definition, and no bound covers both."""
    weight, x = random_float4("nvfp4", rows=ROWS, columns=64), random_x(3, 64)
    prepared = prepare(weight)
    assert DEFINITION.refuses(prepared, x.dtype, 3) == "FP4, which a graph may or may not round"
    check(int4_lora_linear(x, prepared), TILES, weight, x)


@pytest.mark.parametrize("layout", ["float4", "checkpoint"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_x(layout, name, dtype):
    """It is g W with the W that the forward multiplies: rounded, but for float64."""
    weight = random_float4(name, rows=ROWS, columns=COLUMNS)
    g = random_x(7, ROWS, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.bfloat16
    dense = dequantize(weight, wide).double()
    found, exact = through_base(g, prepare(weight, layout=layout), dtype), g.double() @ dense
    assert found.dtype == dtype
    if dtype == torch.float64:
        assert torch.allclose(found, exact, rtol=1e-13, atol=1e-13)
    elif dtype == torch.float32:
        gamma = (ROWS + 4) * 2.0**-24
        assert ((found - exact).abs() <= gamma * (g.double().abs() @ dense.abs())).all()
    else:
        usual = (g.float() @ dense.float()).to(dtype)
        assert rms(found, exact) <= 2 * rms(usual, exact)


def test_gradients_flow_through_a_compiled_layer():
    weight = random_float4("nvfp4", rows=ROWS, columns=COLUMNS)
    a, b = random_x(4, COLUMNS).requires_grad_(), random_x(ROWS, 4).requires_grad_()
    x = random_x(40, COLUMNS).requires_grad_()
    stack = random_stack(adapters=1, rank=4, rows=ROWS, columns=COLUMNS)
    lora = prepare_lora(type(stack)(a[None], b[None], stack.scaling))
    y = int4_lora_linear(x, prepare(weight), lora, torch.zeros(40, dtype=torch.int64))
    found = torch.autograd.grad(y.square().sum(), [x, a, b])
    wide = [one.detach().double().requires_grad_() for one in (x, a, b)]
    w = dequantize(weight).double()
    exact = wide[0] @ w.T + stack.scaling.double() * (wide[0] @ wide[1].T) @ wide[2].T
    expected = torch.autograd.grad(exact.square().sum(), wide)
    for one, other in zip(found, expected, strict=True):
        assert rms(one, other) <= 1e-5 * other.square().mean().sqrt()
