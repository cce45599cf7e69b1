"""Every formulation, compiled, on poisoned buffers: bound, rms error against eager, other ids.

Each formulation is run whether or not it would be chosen; ``test_formulations.py`` calls the same
functions uncompiled, on more operands.
"""

import dataclasses
import itertools

import pytest
import torch

from int4_lora.compiled import layouts, prepare, prepare_lora
from int4_lora.compiled.formulations import FORMULATIONS, TILES
from int4_lora.compiled.graphs import cache as graphs
from int4_lora.compiled.graphs.entry import plan
from int4_lora.reference import (
    error_bound,
    expand,
    int4_linear,
    int4_lora_linear,
    quantize,
    shrink,
)
from support.weights import random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

ROWS, COLUMNS = 208, 256  # three blocks of 64 rows, and a rest
RMS_OVER_EAGER = 2.0


@pytest.fixture(scope="module", autouse=True)
def _poisoned(tmp_path_factory):
    """Fill every buffer that a graph allocates with NaN before it is written."""
    allocate, poisoned_once = torch._C._dynamo.guards._empty_strided_cpu, []

    def poisoned(size, stride, dtype):
        poisoned_once.append(dtype)
        buffer = allocate(size, stride, dtype)
        return buffer.fill_(torch.nan) if dtype.is_floating_point else buffer.fill_(-1)

    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(fx_graph_cache=False):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setattr(torch._C._dynamo.guards, "_empty_strided_cpu", poisoned)
        patch.setattr(graphs, "_graphs", {})
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield
    assert poisoned_once


OF_8_BITS = {  # arguments of random_weight
    "8 bits channel": {"layout": "channel"},
    "8 bits g_idx": {"layout": "g_idx", "symmetric": False},
}


def operands(dtype, tokens, *, seed, form="4 bits"):
    """Return (weight, stack, x, bias) of ordinary values, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    stack = random_stack(rows=ROWS, columns=COLUMNS, dtype=dtype, seed=seed)
    stack.a.div_(COLUMNS**0.5)
    bias = torch.randn(ROWS, generator=generator).to(dtype)
    weight = quantize(dense, group_size=64)
    if form in OF_8_BITS:
        shape = {"rows": ROWS, "columns": COLUMNS, "dtype": dtype, "seed": seed}
        weight = random_weight(**shape, bits=8, **OF_8_BITS[form])
    return weight, stack, random_x(tokens, COLUMNS, dtype, seed), bias


def eager(formulation, weight, stack, x, ids, bias):
    """Return the layer in the dtype of x, eager, with the roundings that a formulation declares."""
    if not formulation.weight_rounded:
        weight = dataclasses.replace(weight, scale=weight.scale.float())
    if not formulation.base_rounded:
        return int4_lora_linear(x, weight, stack, ids, bias)
    delta = expand(shrink(x, stack, ids), stack, ids)
    return (int4_linear(x, weight).float() + delta + bias.float()).to(x.dtype)


def check(formulation, weight, prepared, stack, slices, x, ids, bias):
    """Check a result against its bound, and its rms error against that of the eager reference."""
    y = plan(x, prepared, slices, ids, bias, formulation=formulation)(x, ids)
    exact = int4_lora_linear(x.double(), weight, stack, ids, bias)
    flags = {
        "weight_rounded": formulation.weight_rounded,
        "base_rounded": formulation.base_rounded,
    }
    bound = error_bound(x, weight, stack, ids, bias, **flags)
    assert y.isfinite().all()
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= bound).all()
    usual = eager(formulation, weight, stack, x, ids, bias)
    own, other = ((one.double() - exact).square().mean().sqrt() for one in (y, usual))
    assert own <= RMS_OVER_EAGER * other, f"rms {own:.3g}, eager {other:.3g}"
    return y


@pytest.mark.parametrize(
    ("dtype", "several"),
    [
        (torch.bfloat16, (1, 4, 40)),
        pytest.param(torch.float16, (1, 40), marks=pytest.mark.nightly),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", sorted(FORMULATIONS))
def test_each_is_right_and_replays(name, dtype, several):
    formulation, ran = FORMULATIONS[name], 0
    for tokens, form in itertools.product(several, ("4 bits", *OF_8_BITS)):
        weight, stack, x, bias = operands(dtype, tokens, seed=tokens, form=form)
        lora = prepare_lora(stack)
        for layout in layouts(weight):
            prepared = prepare(weight, layout=layout)
            if formulation.refuses(prepared, dtype, tokens) is not None:
                continue
            if layout == "checkpoint" and form in OF_8_BITS:
                continue  # the same graphs as of 4 bits but for two numbers
            ran += 1
            for shift in range(3):  # the same graph, other adapters for the same rows
                ids = (torch.arange(tokens) + shift) % 4 - 1
                check(formulation, weight, prepared, stack, lora.slices, x, ids, bias)
    assert ran or (name == "int8pack" and dtype != torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        ("int4pack", "4 bits"),
        ("interleaved", "4 bits"),
        ("checkpoint", "4 bits"),
        ("int8", "8 bits g_idx"),
    ],
)
def test_a_rounded_weight_is_rounded_where_sums_are_wider(layout, form):
    """In float32, the rounding of a weight with bfloat16 scales is far above the bound."""
    weight, _, x, _ = operands(torch.bfloat16, 40, seed=3, form=form)
    x, prepared = x.float(), prepare(weight, layout=layout)
    y = plan(x, prepared, formulation=TILES)(x, None)
    exact = int4_lora_linear(x.double(), weight)
    assert ((y.double() - exact).abs() <= error_bound(x, weight, base_rounded=True)).all()


@pytest.mark.parametrize(
    "name",
    [
        TILES.name,
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in sorted(FORMULATIONS)
            if name != TILES.name
        ),
    ],
)
def test_loops_shared_by_two_threads_are_right(name):
    """Use two threads: test processes have one thread each, with which no loop is parallel."""
    formulation, threads, ran = FORMULATIONS[name], torch.get_num_threads(), 0
    torch.set_num_threads(2)
    try:
        for tokens, form in itertools.product((1, 40), ("4 bits", "8 bits channel")):
            weight, stack, x, bias = operands(torch.bfloat16, tokens, seed=tokens, form=form)
            prepared = [prepare(weight, layout=layout) for layout in layouts(weight)]
            taken = [w for w in prepared if formulation.refuses(w, x.dtype, tokens) is None]
            ids, lora = torch.arange(tokens) % 4 - 1, prepare_lora(stack)
            for weight_laid_out in taken[:1]:
                check(formulation, weight, weight_laid_out, stack, lora.slices, x, ids, bias)
                ran += 1
    finally:
        torch.set_num_threads(threads)
    assert ran


def test_a_row_alone_and_in_a_batch():
    weight, stack, x, bias = operands(torch.bfloat16, 24, seed=9)
    ids, lora = torch.arange(24) % 4 - 1, prepare_lora(stack)
    for formulation, layout in itertools.product(FORMULATIONS.values(), layouts(weight)):
        prepared = prepare(weight, layout=layout)
        counts = [n for n in (1, 3, 24) if formulation.refuses(prepared, x.dtype, n) is None]
        for few, many in itertools.pairwise(counts):
            alone, batch = (
                check(formulation, weight, prepared, stack, lora.slices, x[:n], ids[:n], bias)
                for n in (few, many)
            )
            bound = error_bound(
                x[:few], weight, stack, ids[:few], bias, weight_rounded=False, base_rounded=True
            )
            assert ((alone - batch[:few]).double().abs() <= 2 * bound).all(), formulation.name
