"""Products by slices of in_features: right for every unit and slice, with float32 partial sums.

``test_formulations.py`` runs ``split_k`` on every format, uncompiled; the code that a GPU would run
is checked by ``python -m benchmarks.codegen``.
"""

import pytest
import torch

from int4_lora.compiled import prepare, prepare_lora
from int4_lora.compiled.formulations import SPLIT_K, split_k
from int4_lora.compiled.formulations.partial_products import partial_products
from int4_lora.compiled.layouts.interleaved import InterleavedWeight
from int4_lora.reference import LoRASlice, error_bound, int4_lora_linear
from support.weights import narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

COLUMNS = 4224  # 33 times 128: up to 32 slices have no equal number of units
HALVES = (torch.bfloat16, torch.float16)


def check(weight, x, lora=None, ids=None, bias=None):
    prepared = prepare(weight, layout="interleaved")
    assert SPLIT_K.refuses(prepared, x.dtype, x.shape[0]) is None
    slices = () if lora is None else prepare_lora(lora).slices
    y = SPLIT_K.layer(x, prepared, slices, ids, bias)
    exact = int4_lora_linear(x.double(), weight, lora, ids, bias)
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= error_bound(x, weight, lora, ids, bias)).all()


@pytest.mark.parametrize(
    ("layout", "symmetric", "dtype"),
    [
        ("group", True, torch.bfloat16),
        ("group", False, torch.float16),
        ("g_idx", False, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("group", [8, 24, 32, 64, 128, 264, COLUMNS])
def test_groups_and_slices(group, layout, symmetric, dtype):
    weight = random_weight(
        layout, rows=13, columns=COLUMNS, groups=COLUMNS // group, symmetric=symmetric, dtype=dtype
    )
    for tokens in (2, 64):
        check(weight, random_x(tokens, COLUMNS, dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [1, 64, 512])
def test_slices_of_outputs_a_bias_and_ranks(rank, dtype):
    rows, columns = 72, 384  # three groups
    weight = random_weight(rows=rows, columns=columns, groups=3, symmetric=False, dtype=dtype)
    stack = random_stack(rows=rows, columns=columns, rank=rank, dtype=dtype)
    stack.a.div_(columns**0.5)
    lora = [LoRASlice(narrow(stack, 40), 0), LoRASlice(narrow(stack, 16, 48), 48)]
    bias = torch.linspace(-2, 2, rows).to(dtype)
    for tokens in (3, 33):
        ids = torch.arange(tokens) % 4 - 1
        for several in (stack, lora):
            check(weight, random_x(tokens, columns, dtype), several, ids, bias)


def test_partial_sums_are_float32():
    x = torch.tensor([[[4096.0, 1.0, 0.0]]]).to(torch.bfloat16).repeat(2, 1, 1)
    w = torch.ones(2, 3, 1, dtype=torch.bfloat16)
    p = partial_products(x, w)
    assert p.dtype == torch.float32
    assert torch.equal(p, torch.full((2, 1, 1), 4097.0))  # bfloat16 would hold 4096


def of_shape(rows, columns, group):
    weight = random_weight(rows=8, columns=8, groups=1, dtype=torch.bfloat16)
    laid_out = InterleavedWeight.from_packed(weight)
    fields = {
        "words": torch.empty(rows, columns // 8, dtype=torch.int32, device="meta"),
        "scale": torch.empty(rows, columns // group, dtype=torch.bfloat16, device="meta"),
        "shape": (rows, columns),
    }
    return type(laid_out)(**{**vars(laid_out), **fields})


@pytest.mark.parametrize(
    ("rows", "columns", "group", "slices", "columns_of_a_slice"),
    [
        (4096, 4096, 128, 8, 512),  # 64 blocks of outputs; 3 * 132 / 64 asks for 7 slices
        (11008, 4096, 128, 4, 1024),
        (4096, 11008, 128, 8, 1408),  # 86 groups: 8 slices of 11, the last two groups masked
        (4096, 4096, 32, 8, 512),
        (4096, 4096, 4096, 8, 512),
        (28672, 8192, 128, 1, 8192),  # 448 blocks fill the device
        (1024, 4096, 128, 32, 128),
    ],
)
def test_blocks_for_three_on_each_multiprocessor(rows, columns, group, slices, columns_of_a_slice):
    weight = of_shape(rows, columns, group)
    found, units = split_k.slicing(weight)
    assert (found, units * 8 * split_k.unit_words(weight)) == (slices, columns_of_a_slice)


def test_refuses():
    weight = prepare(
        random_weight(rows=48, columns=128, dtype=torch.bfloat16), layout="interleaved"
    )
    assert "both must have one 16-bit dtype" in SPLIT_K.refuses(weight, torch.float16, 4)
    assert "both must have one 16-bit dtype" in SPLIT_K.refuses(weight, torch.float32, 4)
    assert SPLIT_K.refuses(weight, torch.bfloat16, 1) == "1 tokens, not 2 to 64"
    assert SPLIT_K.refuses(weight, torch.bfloat16, 65) == "65 tokens, not 2 to 64"
