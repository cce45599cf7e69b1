"""The judge of a layer's result: right results of every declaration pass, wrong ones do not."""

import dataclasses

import pytest
import torch

from int4_lora.reference import LoRASlice, error_bound, int4_lora_linear, int4_moe
from int4_lora.reference.conformance import (
    Manifest,
    Operands,
    check_addition,
    check_experts,
    check_linear,
)
from int4_lora.reference.conformance.judging.yardstick import yardstick
from support.experts import random_experts, random_experts_lora, random_routing
from support.weights import narrow, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

ROUNDED = {"weight_rounded": True, "base_rounded": False}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WEIGHT = random_weight(rows=104, symmetric=False, dtype=torch.bfloat16)
STACK = random_stack(rows=104, dtype=torch.bfloat16)
SLICES = [LoRASlice(narrow(STACK, 40), 64), LoRASlice(narrow(STACK, 56, 40), 0)]
X = random_x(tokens=24, dtype=torch.bfloat16)
IDS = torch.arange(24) % 4 - 1
BIAS = torch.linspace(-1, 1, 104).to(torch.bfloat16)
RIGHT = int4_lora_linear(X, WEIGHT, SLICES, IDS, BIAS)


def rule(y, x=X, weight=WEIGHT, lora=SLICES, ids=IDS, bias=BIAS, **flags):
    finding = check_linear(y, x, weight, lora, ids, bias, **{**ROUNDED, **flags})
    return None if finding is None else finding.rule


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_passes(dtype):
    x, bias = X.to(dtype), BIAS.to(dtype)
    assert rule(int4_lora_linear(x, WEIGHT, SLICES, IDS, bias), x, bias=bias) is None
    assert rule(int4_lora_linear(x, WEIGHT, STACK, IDS), x, lora=STACK, bias=None) is None
    plain = int4_lora_linear(x, WEIGHT)
    assert check_linear(plain, x, WEIGHT, **ROUNDED) is None


@pytest.mark.parametrize(
    "flags",
    [
        {"weight_rounded": False, "base_rounded": False},
        {"weight_rounded": True, "base_rounded": True},
        {"weight_rounded": False, "base_rounded": True},
        {"weight_rounded": False, "base_rounded": True, "delta_rounded": True},
    ],
)
def test_a_layer_with_other_roundings_passes_where_it_declares_them(flags):
    operands = Operands(x=X, weight=WEIGHT, lora=SLICES, adapter_ids=IDS, bias=BIAS)
    y = yardstick("int4_lora_linear", operands, Manifest(**flags))
    assert rule(y, **flags) is None
    assert rule(y) == "bound"


def changed(value):
    y = RIGHT.clone()
    y[23, 103] = value
    return y


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        (None, "form"),
        (RIGHT.float(), "form"),
        (RIGHT[:, 1:], "form"),
        (RIGHT.to("meta"), "form"),
        (changed(float("nan")), "class"),
        (changed(float("-inf")), "class"),
        (changed(0.0), "bound"),
        (RIGHT.roll(1, 0), "bound"),
        (int4_lora_linear(X, WEIGHT, SLICES, IDS), "bound"),
        (int4_lora_linear(X, WEIGHT, STACK, IDS, BIAS), "bound"),
        (int4_lora_linear(X, WEIGHT, SLICES, IDS.clamp(min=0), BIAS), "bound"),
        (
            int4_lora_linear(
                X, dataclasses.replace(WEIGHT, scale=WEIGHT.scale.roll(1, 1)), SLICES, IDS, BIAS
            ),
            "bound",
        ),
    ],
)
def test_a_wrong_result_is_found(y, expected):
    assert rule(y) == expected


def test_errors_within_their_bounds_are_found_together():
    x = X.float()
    exact = int4_lora_linear(x.double(), WEIGHT, SLICES, IDS, BIAS)
    bound = error_bound(x, WEIGHT, SLICES, IDS, BIAS)
    assert rule(exact.float(), x) is None
    assert rule((exact + 0.5 * bound).float(), x) == "rms"


def outwards(y):
    """Return the next number of bfloat16 further from zero."""
    return (y.contiguous().view(torch.int16) + 1).view(torch.bfloat16)


def test_several_calls_at_one_token_are_judged_together():
    calls = [
        int4_lora_linear(X[t : t + 1], WEIGHT, SLICES, IDS[t : t + 1], BIAS) for t in range(24)
    ]
    assert rule(torch.cat(calls)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_added_to_a_base_pass(dtype):
    x, base = X.to(dtype), torch.linspace(-3, 3, 24 * 104).reshape(24, 104).to(dtype)
    delta = int4_lora_linear(x.float(), zero_weight(), SLICES, IDS)
    y = (base.float() + delta).to(dtype)
    assert check_addition(y, base, x, SLICES, IDS) is None
    assert check_addition(y.roll(1, 0), base, x, SLICES, IDS).rule == "bound"
    assert check_addition(base, base, x, SLICES, IDS).rule == "bound"
    assert check_addition(y + base, base, x, SLICES, IDS).rule == "bound"
    assert check_addition(y.double(), base, x, SLICES, IDS).rule == "form"
    for value in (float("nan"), float("inf")):
        spoilt = y.clone()
        spoilt[3, 5] = value
        assert check_addition(spoilt, base, x, SLICES, IDS).rule == "class"


def zero_weight():
    return dataclasses.replace(WEIGHT, scale=torch.zeros_like(WEIGHT.scale))


def test_an_addition_with_too_large_an_rms_error_is_found():
    base = torch.linspace(-3, 3, 24 * 104).reshape(24, 104).to(torch.bfloat16)
    delta = int4_lora_linear(X.float(), zero_weight(), SLICES, IDS)
    exact = base.float() + delta
    nearest = exact.to(torch.bfloat16)
    away = torch.where(nearest.abs() > exact.abs(), nearest, outwards(nearest))
    assert check_addition(away, base, X, SLICES, IDS).rule == "rms"


def test_experts_are_judged():
    experts, lora = random_experts(), random_experts_lora()
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    ids, p = random_routing(32)
    adapter_ids = torch.arange(32) % 4 - 1
    operands = x, experts, ids, p, lora, adapter_ids
    flags = {"weight_rounded": True, "steps_rounded": False}
    y = int4_moe(*operands)
    assert check_experts(y, *operands, **flags) is None
    assert check_experts(y.float(), *operands, **flags).rule == "form"
    assert check_experts(int4_moe(*operands[:4]), *operands, **flags).rule == "bound"
    gelu = int4_moe(*operands, activation="gelu_tanh")
    assert check_experts(gelu, *operands, **flags).rule == "bound"
    assert check_experts(gelu, *operands, activation="gelu_tanh", **flags) is None
