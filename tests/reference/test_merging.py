"""merge and merge_quantized."""

import unittest

import pytest
import torch
from parameterized import parameterized

from int4_lora.reference import (
    LoRASlice,
    LoRAStack,
    PackedWeight,
    dequantize,
    int4_linear,
    int4_lora_linear,
    merge,
    merge_quantized,
    pack,
)
from support.weights import every_format, random_stack, random_weight, random_x

pytestmark = pytest.mark.versions

STACK = random_stack()


def is_nearest(rounded, value):
    """Return whether no neighbour of ``rounded`` in its dtype is closer to the float64 value."""
    error = (rounded.double() - value).abs()
    for end in (float("inf"), float("-inf")):
        neighbour = torch.nextafter(rounded, torch.full_like(rounded, end)).double()
        if not (error <= (neighbour - value).abs()).all():
            return False
    return True


def exact(weight, stack, adapter):
    a, b = stack.a[adapter].double(), stack.b[adapter].double()
    return dequantize(weight).double() + stack.scaling[adapter] * (b @ a)


class EveryFormat(unittest.TestCase):
    @parameterized.expand(every_format())
    def test_merge_rounds_once(self, name, arguments):
        weight = random_weight(**arguments)
        for adapter in range(3):
            merged = merge(weight, STACK, adapter)
            assert merged.dtype == weight.scale.dtype
            assert is_nearest(merged, exact(weight, STACK, adapter))

    @parameterized.expand(every_format())
    def test_merge_quantized_keeps_the_format_and_tells_the_cost(self, name, arguments):
        weight = random_weight(**arguments)
        merged, cost = merge_quantized(weight, STACK, 1)
        assert (merged.shape, merged.bits, merged.strategy) == (
            weight.shape,
            weight.bits,
            weight.strategy,
        )
        assert merged.symmetric == weight.symmetric
        assert merged.scale.dtype == weight.scale.dtype
        assert merged.g_idx is weight.g_idx
        lost = dequantize(merged).double() - exact(weight, STACK, 1)
        assert cost.max_error == lost.abs().max().item()
        relative = (lost.norm() / exact(weight, STACK, 1).norm()).item()
        assert cost.relative_error == pytest.approx(relative, rel=1e-12)
        # a clamped code is off by a step at most, and the product is rounded to the scale's dtype
        rounding = torch.finfo(merged.scale.dtype).eps * dequantize(merged).abs().max().item()
        assert cost.max_error <= merged.scale.max().item() + rounding


def test_merging_nothing_changes_nothing():
    nothing = LoRAStack(STACK.a, torch.zeros_like(STACK.b), STACK.scaling)
    for symmetric in (True, False):
        weight = random_weight(symmetric=symmetric, dtype=torch.bfloat16)
        assert torch.equal(merge(weight, nothing, 2), dequantize(weight))


def test_quantising_again_is_exact_where_the_range_is_used_in_full():
    weight = random_weight("channel", columns=48, symmetric=False)
    codes = torch.arange(-8, 8).repeat(13, 3).to(torch.int8)  # every code in every row
    weight = PackedWeight(
        packed=pack(codes),
        scale=2.0 ** torch.arange(-6.0, 7.0)[:, None],
        shape=(13, 48),
        zero_point=weight.zero_point,
    )
    nothing = LoRAStack.stack([(torch.zeros(1, 48), torch.zeros(13, 1), 1.0)])
    merged, cost = merge_quantized(weight, nothing, 0)
    assert (cost.max_error, cost.relative_error) == (0.0, 0.0)
    assert torch.equal(merged.packed, weight.packed)
    assert torch.equal(merged.scale, weight.scale)


def test_a_merged_weight_answers_as_the_adapter_does():
    weight, x = random_weight(symmetric=False), random_x().double()
    for adapter in range(3):
        ids = torch.full((6,), adapter)
        answer = int4_lora_linear(x, weight, STACK, ids)
        torch.testing.assert_close(x @ exact(weight, STACK, adapter).T, answer)
        merged, cost = merge_quantized(weight, STACK, adapter)
        difference = (int4_linear(x, merged) - answer).abs()
        assert (difference <= cost.max_error * x.abs().sum(1, keepdim=True) * (1 + 1e-9)).all()


def test_slices_are_merged_into_their_own_rows():
    weight = random_weight()
    part = LoRAStack(STACK.a, STACK.b[:, :5], STACK.scaling)
    merged = merge(weight, [LoRASlice(part, 4)], 1)
    base = dequantize(weight)
    assert torch.equal(merged[:4], base[:4])
    assert torch.equal(merged[9:], base[9:])
    expected = base[4:9].double() + part.scaling[1] * (part.b[1].double() @ part.a[1].double())
    assert torch.equal(merged[4:9], expected.float())


def test_two_slices_are_both_merged():
    weight = random_weight()
    first = LoRAStack(STACK.a, STACK.b[:, :5], STACK.scaling)
    second = LoRAStack(STACK.a.flip(1), STACK.b[:, 5:], STACK.scaling)
    merged = merge(weight, [LoRASlice(second, 5), LoRASlice(first, 0)], 1)
    base = dequantize(weight).double()
    for part, rows in ((first, slice(0, 5)), (second, slice(5, 13))):
        delta = part.scaling[1] * (part.b[1].double() @ part.a[1].double())
        assert torch.equal(merged[rows], (base[rows] + delta).float())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_a_sum_just_above_a_tie_is_rounded_up(dtype, bits):
    scale = torch.ones(1, 1, dtype=dtype)
    weight = PackedWeight(torch.tensor([[9]], dtype=torch.int32), scale, (1, 1))
    a, b = torch.tensor([[[1.0]], [[2.0**-bits + 2.0**-40]]], dtype=torch.float64)
    lora = LoRAStack.stack([(a, b, 1.0)])
    assert merge(weight, lora, 0).item() == 1 + 2.0 ** (1 - bits)


def test_quantising_again_takes_no_gradient():
    lora = LoRAStack(STACK.a.clone().requires_grad_(), STACK.b, STACK.scaling)
    merged, _ = merge_quantized(random_weight(), lora, 0)
    assert not merged.scale.requires_grad
    assert not merge(random_weight(), lora, 0).requires_grad


WEIGHT = random_weight()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"adapter must be in \[0, 3\), got 3", lambda: merge(WEIGHT, STACK, 3)),
        (ValueError, r"adapter must be in \[0, 3\), got -1", lambda: merge(WEIGHT, STACK, -1)),
        (TypeError, "adapter must be an int, got float", lambda: merge(WEIGHT, STACK, 0.0)),
        (
            ValueError,
            "one device: weight is on cpu, lora is on meta",
            lambda: merge(WEIGHT, STACK.to("meta"), 0),
        ),
        (ValueError, "lora must hold adapters, got None", lambda: merge(WEIGHT, None, 0)),
        (ValueError, r"lora must hold adapters, got \[\]", lambda: merge(WEIGHT, [], 0)),
        (
            ValueError,
            "lora must have the out_features of weight, 13",
            lambda: merge_quantized(WEIGHT, random_stack(rows=12), 0),
        ),
        (
            ValueError,
            r"weight must be finite, got nan at \[0, 0\]",
            lambda: merge_quantized(
                random_weight(), LoRAStack(STACK.a * float("nan"), STACK.b, STACK.scaling), 0
            ),
        ),
        (
            ValueError,
            "weight must have scales that are finite in float16",
            lambda: merge_quantized(
                random_weight(dtype=torch.float16),
                LoRAStack(STACK.a * 1e6, STACK.b, STACK.scaling),
                0,
            ),
        ),
    ],
)
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()
