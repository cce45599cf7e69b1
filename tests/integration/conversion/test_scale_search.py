"""Quantised again: what is said of the cost is true, and no group is worse than by min-max."""

import dataclasses

import pytest
import torch
from parameterized import parameterized

from int4_lora.integration.conversion.scale_search import requantize
from int4_lora.reference import dequantize, merge_quantized
from int4_lora.reference.dequantization import scale_columns, scale_rows
from int4_lora.reference.lora_stack import LoRAStack
from support.weights import every_format, random_weight

pytestmark = pytest.mark.versions

FORMATS = [(name, arguments) for name, arguments in every_format()]


def merged(weight, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, weight.in_features, generator=generator)
    b = torch.randn(weight.out_features, 3, generator=generator)
    base = dequantize(weight, torch.float64)
    return base + 0.3 * base.std() * b.double() @ a.double(), LoRAStack.stack(
        [(a, b, 0.3 * float(base.std()))]
    )


@parameterized.expand(FORMATS)
def test_the_cost_is_what_it_says(name, arguments):
    weight = random_weight(**arguments)
    exact, _ = merged(weight)
    found = requantize(exact, weight)
    difference = dequantize(found.weight, torch.float64) - exact
    assert found.squared_error == pytest.approx(float(difference.square().sum()), rel=1e-12)
    assert found.squared_norm == pytest.approx(float(exact.square().sum()), rel=1e-12)
    assert found.max_error == float(difference.abs().max())
    assert found.squared_error <= found.minmax_squared_error
    for field in ("shape", "bits", "group_size"):
        assert getattr(found.weight, field) == getattr(weight, field)
    assert found.weight.g_idx is weight.g_idx
    assert found.weight.scale.dtype == weight.scale.dtype
    assert found.weight.strategy == weight.strategy
    assert found.weight.symmetric == weight.symmetric


@parameterized.expand(FORMATS)
def test_without_a_search_it_is_the_references_merge(name, arguments):
    weight = random_weight(**arguments)
    exact, stack = merged(weight)
    expected, cost = merge_quantized(weight, stack, 0)
    exact = dequantize(weight, torch.float64)
    exact += stack.scaling[0].double() * (stack.b[0].double() @ stack.a[0].double())
    found = requantize(exact, weight, search=False)
    assert torch.equal(found.weight.packed, expected.packed)
    assert torch.equal(found.weight.scale, expected.scale)
    assert found.max_error == pytest.approx(cost.max_error, rel=1e-12)
    assert found.squared_error == found.minmax_squared_error


@parameterized.expand(FORMATS)
def test_no_group_is_worse_than_by_min_max(name, arguments):
    weight = random_weight(**arguments)
    exact, _ = merged(weight, seed=3)
    lost = []
    for search in (True, False):
        found = requantize(exact, weight, search=search).weight
        off = (dequantize(found, torch.float64) - exact).square()
        groups = off.new_zeros(weight.out_features, int(scale_columns(weight).max()) + 1)
        groups.index_add_(1, scale_columns(weight), off)
        table = groups.new_zeros(int(scale_rows(weight).max()) + 1, groups.shape[1])
        lost.append(table.index_add_(0, scale_rows(weight), groups))
    assert (lost[0] <= lost[1] * (1 + 1e-12)).all()


def test_the_search_is_better_on_ordinary_weights():
    weight = random_weight(rows=64, columns=512, groups=4, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(64, 512, generator=generator, dtype=torch.float64)
    found = requantize(exact, weight)
    assert found.squared_error < 0.9 * found.minmax_squared_error


def test_a_weight_that_did_not_change_keeps_its_grid():
    weight = random_weight(rows=16, columns=64, groups=2, dtype=torch.float16)
    found = requantize(dequantize(weight, torch.float64), weight)
    assert found.squared_error == 0
    assert torch.equal(dequantize(found.weight), dequantize(weight))


def test_scales_that_cannot_be_used_are_no_candidates():
    weight = random_weight(rows=16, columns=64, groups=2, dtype=torch.float16)
    scale = weight.scale.clone()
    scale[0, 0], scale[1, 0], scale[2, 0], scale[3, 0] = float("nan"), float("inf"), 0.0, -1.0
    spoilt = dataclasses.replace(weight, scale=scale)
    exact, _ = merged(weight)
    found = requantize(exact, spoilt)
    assert found.weight.scale.isfinite().all()
    assert (found.weight.scale > 0).all()
    assert found.squared_error <= found.minmax_squared_error


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "finite"), (1e9, "float16")])
def test_a_weight_that_cannot_be_quantised(value, message):
    weight = random_weight(rows=16, columns=64, groups=2, dtype=torch.float16)
    exact = dequantize(weight, torch.float64)
    exact[3, 5] = value
    with pytest.raises(ValueError, match=message):
        requantize(exact, weight)
