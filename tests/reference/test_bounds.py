"""error_bound: never exceeded by a correct result, tight, and exceeded by a wrong one."""

import dataclasses
import math

import pytest
import torch

from int4_lora.reference import (
    LoRASlice,
    LoRAStack,
    dequantize,
    error_bound,
    int4_linear,
    int4_lora_linear,
    quantize,
)
from support.weights import random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
TOKENS = OUT = 1024  # 2**20 elements


def problem(columns, dtype, *, lora=True, seed=0, out=OUT):
    """Return random operands: x, weight, lora, ids and bias."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(out, columns, generator=generator)
    scale_dtype = torch.float32 if dtype == torch.float64 else dtype
    weight = quantize(dense, group_size=None, symmetric=False, scale_dtype=scale_dtype)
    x = random_x(TOKENS, columns, dtype, seed)
    bias = torch.randn(out, generator=generator)
    if not lora:
        return x, weight, None, None, None
    stack = random_stack(adapters=4, rank=8, rows=out, columns=columns)
    ids = torch.randint(-1, 4, (TOKENS,), generator=generator)
    return x, weight, stack, ids, bias


def worst(y, operands, **declared):
    """Return the largest error over its bound."""
    x, *others = operands
    error = (y.double() - int4_lora_linear(x.double(), *others)).abs()
    return (error / error_bound(x, *others, **declared)).max().item()


def summed_one_by_one(x, dense):
    """Return x W^T accumulated in float32, one product after the other."""
    total = torch.zeros(x.shape[0], dense.shape[0])
    for column in range(x.shape[1]):
        total += x[:, column].float()[:, None] * dense[:, column].float()
    return total


@pytest.mark.parametrize("columns", [8, 64, 512])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_million_random_elements_stay_below(dtype, columns):
    operands = problem(columns, dtype)
    assert worst(int4_lora_linear(*operands), operands) <= 1


@pytest.mark.parametrize("columns", [8, 32, 64])
def test_float32_comes_within_twenty_times_of_the_bound(columns):
    """The bound grows with n, random errors with its root: hence short sums here."""
    operands = problem(columns, torch.float32, lora=False)
    x, weight, *_ = operands
    for y in (int4_linear(x, weight), summed_one_by_one(x, dequantize(weight))):
        assert 1 / 20 <= worst(y, operands) <= 1


def test_float32_comes_within_twenty_times_of_the_bound_with_adapters():
    operands = problem(8, torch.float32)
    assert 1 / 20 <= worst(int4_lora_linear(*operands), operands) <= 1


def test_a_long_sum_reaches_half_the_bound_when_every_rounding_goes_one_way():
    """1 + 2^-25 + 2^-25 + ... in float32 stays 1: the worst case of summing in order."""
    columns = 4096
    weight = random_weight("channel", rows=1, columns=columns, groups=1)
    codes = torch.full((1, columns), 0x11111111 * 9 - 2**32, dtype=torch.int64)
    packed = codes[:, : columns // 8].to(torch.int32)  # every code is 1
    weight = dataclasses.replace(weight, packed=packed, scale=torch.ones(1, 1))
    x = torch.full((1, columns), 2.0**-25)
    x[0, 0] = 1.0
    operands = (x, weight, None, None, None)
    assert 0.4 <= worst(summed_one_by_one(x, dequantize(weight)), operands) <= 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_last_rounding_is_reached(dtype):
    if dtype != torch.float32:
        operands = problem(16, dtype, lora=False)
        assert worst(int4_linear(*operands[:2]), operands) >= 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_unrounded_weight_is_within_the_bound_only_when_declared(dtype):
    operands = problem(64, dtype, lora=False)
    x, weight, *_ = operands
    codes = dequantize(dataclasses.replace(weight, scale=torch.ones(OUT, 1)))
    y = (x.double() @ (codes.double() * weight.scale.double()).T).to(dtype)
    assert worst(y, operands, weight_rounded=False) <= 1 < worst(y, operands)
    assert worst(int4_linear(x, weight), operands, weight_rounded=False) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_base_is_within_the_bound_only_when_declared(dtype):
    x, weight, stack, ids, bias = operands = problem(64, dtype)
    delta = int4_lora_linear(x.double(), weight, stack, ids) - int4_linear(x.double(), weight)
    with_bias, without = int4_linear(x, weight, bias).double(), int4_linear(x, weight).double()
    twice = (without + bias.double()).to(dtype).double()
    for base in (with_bias, without + bias.double(), twice):
        y = (base + delta).to(dtype)
        assert worst(y, operands, base_rounded=True) <= 1 < worst(y, operands)
    assert worst(int4_lora_linear(*operands), operands, base_rounded=True) <= 1


def test_a_float16_accumulator_is_caught_and_can_be_declared():
    operands = problem(64, torch.float16, lora=False)
    x, weight, *_ = operands
    total = torch.zeros(TOKENS, OUT, dtype=torch.float16)
    for column in range(64):
        total += x[:, column][:, None] * dequantize(weight)[:, column]
    assert worst(total, operands) > 1
    assert worst(total, operands, accumulate=torch.float16) <= 1


def test_float64_operands_are_summed_in_float64():
    operands = problem(64, torch.float64)
    x, weight, _, _, bias = operands
    bound = error_bound(*operands)
    assert bound.dtype == torch.float64
    assert (bound < 1e-10).all()
    reversed_x, order = x.flip(1), torch.arange(63, -1, -1)
    y = reversed_x @ dequantize(weight, torch.float64)[:, order].T + bias.double()
    base = (x, weight, None, None, bias)
    assert 0 < worst(y, base) <= 1


WRONG = [
    ("one weight", lambda d: d.index_put_((torch.tensor(0), torch.tensor(0)), d[0, 0] + 0.05)),
    ("half an ulp of every weight", lambda d: d * (1 + 2.0**-9)),
    ("last column", lambda d: torch.cat([d[:, :-1], torch.zeros(len(d), 1)], dim=1)),
    ("two rows", lambda d: d[[1, 0, *range(2, len(d))]]),
]


@pytest.mark.parametrize(("name", "spoil"), WRONG)
def test_wrong_answers_are_outside(name, spoil):
    operands = problem(64, torch.float32, lora=False)
    x, weight, *_ = operands
    assert worst(x @ spoil(dequantize(weight).clone()).T, operands) > 1


def test_slices_have_the_bound_of_their_own_outputs():
    x, weight, stack, ids, _ = problem(64, torch.float32)
    part = LoRAStack(stack.a, stack.b[:, :100], stack.scaling)
    bound = error_bound(x, weight, [LoRASlice(part, 50)], ids)
    base = error_bound(x, weight)
    assert (bound[ids >= 0, 50:150] > 1.5 * base[ids >= 0, 50:150]).all()
    assert (bound[:, 150:] < 1.5 * base[:, 150:]).all()
    y = int4_lora_linear(x, weight, [LoRASlice(part, 50)], ids)
    assert worst(y, (x, weight, [LoRASlice(part, 50)], ids)) <= 1


def test_overflow_has_no_bound():
    weight = random_weight("channel", rows=2, columns=64, dtype=torch.float16)
    weight = dataclasses.replace(weight, scale=torch.tensor([[1000.0], [0.01]]).half())
    x = torch.full((1, 64), 100.0, dtype=torch.float16)
    exact = int4_linear(x.double(), weight)
    assert exact[0, 0].abs() > 65520 > exact[0, 1].abs()
    assert error_bound(x, weight)[0].isinf().tolist() == [True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_bound(value):
    weight = random_weight("channel")
    x = random_x()
    x[0, 0] = value
    bound = error_bound(x, weight)
    assert bound[0].isinf().all()
    assert bound[1:].isfinite().all()


def test_a_sum_too_long_for_the_accumulator_has_no_bound():
    operands = problem(2048, torch.float16, lora=False)
    assert error_bound(*operands, accumulate=torch.float16).isinf().all()


def test_nothing_in_is_nothing_but_underflow():
    bound = error_bound(torch.zeros(2, 44), random_weight())
    assert (bound > 0).all()
    assert (bound < 1e-35).all()


def test_refuses():
    weight, x = random_weight(), random_x()
    with pytest.raises(TypeError, match=r"accumulate must be a float dtype, got torch\.int8"):
        error_bound(x, weight, accumulate=torch.int8)
    with pytest.raises(TypeError, match=r"x must be a tensor of .* got None"):
        error_bound(None, weight)
    with pytest.raises(TypeError, match="weight must be a PackedWeight"):
        error_bound(x, weight.packed)
    with pytest.raises(ValueError, match="adapter_ids must be given with lora"):
        error_bound(x, weight, random_stack())
