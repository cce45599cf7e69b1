"""Every formulation computes the reference's result, within the bound of its roundings.

The layers are pure functions and are called uncompiled here; ``test_linear.py`` compiles them.
"""

import dataclasses
import itertools
import unittest

import pytest
import torch
from parameterized import parameterized

from int4_lora.compiled import layouts, prepare, prepare_lora
from int4_lora.compiled.formulations import FORMULATIONS, MAGIC_GEMV
from int4_lora.reference import LoRASlice, dequantize, error_bound, int4_lora_linear, pack
from support.weights import every_format, narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

SHAPES = [{"rows": 13, "columns": 64}, {"rows": 48, "columns": 128}, {"rows": 13, "columns": 44}]
CASES = [
    (f"{index}_{name}", {**arguments, **shape})
    for (index, shape), (name, arguments) in itertools.product(enumerate(SHAPES), every_format())
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def cancelled(x, weight):
    """Return the sum of |x| |s| over a row, which ``Formulation.cancellation`` multiplies."""
    ones = pack(torch.ones(weight.shape, dtype=torch.int8), bits=weight.bits)
    scale = dequantize(dataclasses.replace(weight, packed=ones, zero_point=None)).double().abs()
    return x.double().abs() @ scale.T


def within(name, layout, weight, x, lora=None, ids=None, bias=None):
    """Return whether a formulation's result is within its bound, or None if it refuses."""
    formulation = FORMULATIONS[name]
    prepared = prepare(weight, layout=layout)
    if formulation.refuses(prepared, x.dtype, x.shape[0]) is not None:
        return None
    slices = () if lora is None else prepare_lora(lora).slices
    y = formulation.layer(x, prepared, slices, ids, bias)
    assert y.dtype == x.dtype
    exact = int4_lora_linear(x.double(), weight, lora, ids, bias)
    flags = (formulation.weight_rounded, formulation.base_rounded)
    bound = error_bound(x, weight, lora, ids, bias, weight_rounded=flags[0], base_rounded=flags[1])
    assert y.shape == exact.shape
    if formulation.cancellation:
        bound = bound + formulation.cancellation * cancelled(x, weight)
    return bool(((y.double() - exact).abs() <= bound).all())


def each(weight, x, *operands):
    """Check every formulation that takes a weight against its bound, in every layout."""
    ran = set()
    for name, layout in itertools.product(FORMULATIONS, layouts(weight)):
        right = within(name, layout, weight, x, *operands)
        assert right in (True, None), (name, layout, x.dtype)
        ran |= {name} if right else set()
    return ran


class EveryFormulation(unittest.TestCase):
    @parameterized.expand(CASES)
    def test_every_format(self, name, arguments):
        weight = random_weight(**arguments)
        shape = {"rows": weight.out_features, "columns": weight.in_features}
        stack = random_stack(**shape)
        ids, bias = torch.tensor([0, -1, 2, 1]), torch.linspace(-1, 1, weight.out_features)
        for dtype in (weight.scale.dtype, torch.float32):
            x = random_x(4, weight.in_features, dtype)
            each(weight, x, stack, ids, bias)
            each(weight, x)

    def test_each_runs_somewhere(self):
        of_four = random_weight(rows=48, columns=128, dtype=torch.bfloat16)
        of_eight = random_weight("channel", rows=48, columns=128, bits=8, dtype=torch.bfloat16)
        ran = set()
        for dtype, tokens in itertools.product((torch.bfloat16, torch.float32), (1, 4)):
            for weight in (of_four, of_eight):
                ran |= each(weight, random_x(tokens, 128, dtype))
        assert ran == set(FORMULATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 17])
@pytest.mark.parametrize("form", [{}, {"bits": 8, "layout": "channel"}], ids=["4", "8"])
def test_tokens_and_dtypes(dtype, tokens, form):
    # blocks of 64 rows, and a rest
    weight = random_weight(rows=144, columns=128, dtype=torch.bfloat16, **form)
    stack = random_stack(rows=144, columns=128)
    ids = torch.arange(tokens) % 4 - 1
    slices = [LoRASlice(narrow(stack, 16), 0), LoRASlice(narrow(stack, 128, 16), 16)]
    x = random_x(tokens, 128, dtype)
    for lora, chosen in ((None, None), (stack, ids), (slices, ids), (slices[1:], ids)):
        for bias in (None, torch.linspace(-2, 2, 144)):
            each(weight, x, lora, chosen, bias)


@pytest.mark.parametrize(
    ("adapters", "rank"), [(1, 1), (1, 512), (3, 64), (3, 65), (9, 65), (9, 7), (64, 2)]
)
@pytest.mark.parametrize("tokens", [2, 40])
def test_ranks_and_adapters(adapters, rank, tokens):
    weight = random_weight(rows=48, columns=128, symmetric=False)
    stack = random_stack(adapters=adapters, rank=rank, rows=48, columns=128)
    ids = torch.arange(tokens) % (adapters + 1) - 1
    assert each(weight, random_x(tokens, 128), stack, ids) == (
        {"gemv", "tiles", "definition"} if tokens <= 4 else {"tiles", "definition"}
    )


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize(("adapters", "rank"), [(3, 4), (3, 65), (9, 65)])
def test_ids_of_no_adapter_contribute_nothing(tokens, adapters, rank):
    weight = random_weight(rows=48, columns=128)
    stack = random_stack(adapters=adapters, rank=rank, rows=48, columns=128)
    slices = prepare_lora(stack).slices
    x = random_x(tokens, 128)
    ids = torch.tensor([adapters, -2, 2**32, -(2**40)]).repeat(tokens // 4)
    for name, layout in itertools.product(FORMULATIONS, layouts(weight)):
        formulation, prepared = FORMULATIONS[name], prepare(weight, layout=layout)
        if formulation.refuses(prepared, x.dtype, tokens) or name == "definition":
            continue  # uncompiled, the definition refuses such ids
        alone = formulation.layer(x, prepared, (), None, None)
        assert torch.equal(formulation.layer(x, prepared, slices, ids, None), alone), name


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("spoiled", ["a", "b", "scaling", "x"])
@pytest.mark.parametrize("adapter", [0, 2])  # which -1 as an index might lead to
@pytest.mark.parametrize("rank", [4, 65])  # up to 64 the sums are written out; above, products
@pytest.mark.parametrize("bits", [4, 8])
def test_a_nan_stays_with_its_own_tokens(tokens, spoiled, adapter, rank, bits):
    weight = random_weight(rows=48, columns=128, bits=bits)
    stack = random_stack(rows=48, columns=128, rank=rank)
    x, ids = random_x(tokens, 128), torch.tensor([0, 2, -1, 3]).repeat(tokens // 4)
    bad = ids == adapter
    if spoiled == "x":
        x[bad] = torch.nan
    else:
        getattr(stack, spoiled)[adapter] = torch.nan
    slices = prepare_lora(stack).slices
    for name, layout in itertools.product(FORMULATIONS, layouts(weight)):
        formulation, prepared = FORMULATIONS[name], prepare(weight, layout=layout)
        if name == "definition":
            ids = ids.where(ids < 3, -1)  # uncompiled, it refuses an id of 3
        if formulation.refuses(prepared, x.dtype, tokens) is None:
            y = formulation.layer(x, prepared, slices, ids, None)
            assert y[bad].isnan().all(), name
            assert y[~bad].isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_magic_numbers_cancel_no_more_than_declared(dtype, symmetric):
    weight = random_weight(rows=48, columns=128, dtype=dtype, symmetric=symmetric)
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    if not symmetric:
        zeros = torch.full(weight.scale.shape, 3, dtype=torch.int8)
        weight = dataclasses.replace(weight, zero_point=pack(zeros, dim=0))
        codes += 3
    nothing = dataclasses.replace(weight, packed=pack(codes))  # every weight is 0
    prepared = prepare(nothing, layout="interleaved")
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for spread in (0, 4, 8):
        exponents = torch.randint(-spread, spread + 1, (64, 128), generator=generator)
        x = (torch.randn(64, 128, generator=generator) * 2.0**exponents).to(dtype)
        y = torch.cat([MAGIC_GEMV.layer(row[None], prepared, (), None, None) for row in x])
        share = (y.double().abs() / cancelled(x, nothing)).max() / MAGIC_GEMV.cancellation
        worst = max(worst, float(share))
    assert worst <= 1
    assert dtype != torch.float16 or worst > 1e-4  # the cancellation does add errors


def test_magic_numbers_on_ordinary_weights_need_no_more_than_the_bound():
    for dtype, size in itertools.product((torch.bfloat16, torch.float16), (32, 128)):
        weight = random_weight(rows=64, columns=512, groups=512 // size, dtype=dtype)
        prepared = prepare(weight, layout="interleaved")
        x = random_x(1, 512, dtype)
        y = MAGIC_GEMV.layer(x, prepared, (), None, None)
        exact = int4_lora_linear(x.double(), weight)
        assert ((y.double() - exact).abs() <= error_bound(x, weight, weight_rounded=False)).all()
