"""error_bound in worst cases made by hand: each term is needed, and overflow has no bound.

Random errors stay far below gamma_n, so that a missing term would not show in them. Here every
rounding goes the same way, or a number on the way leaves the range.
"""

import pytest
import torch

from int4_lora.reference import (
    LoRAStack,
    PackedWeight,
    error_bound,
    int4_linear,
    int4_lora_linear,
    pack,
)

pytestmark = pytest.mark.versions

N = 2**16


def one_weight(code=1, scale=1.0, dtype=torch.float32, columns=1, rows=1):
    codes = torch.full((rows, columns), code, dtype=torch.int8)
    return PackedWeight(
        pack(codes), torch.full((rows, 1), scale, dtype=dtype), shape=(rows, columns)
    )


def one_adapter(a=1.0, b=1.0, scaling=1.0, rank=1, columns=1, dtype=torch.float32):
    pair = (torch.full((rank, columns), a, dtype=dtype), torch.full((1, rank), b, dtype=dtype))
    return LoRAStack.stack([(*pair, scaling)])


def near_one(seed):
    """Return float32 numbers just above 1, where a rounding is relatively largest."""
    generator = torch.Generator().manual_seed(seed)
    return 1 + 2.0**-10 * torch.rand(N, 1, generator=generator)


def ratio(y, *operands, **declared):
    error = (y.double() - int4_lora_linear(operands[0].double(), *operands[1:])).abs()
    return (error / error_bound(*operands, **declared)).max().item()


ZERO_IDS = torch.zeros(1, dtype=torch.int64)


def test_the_magnitude_of_the_bias_counts():
    x, bias = torch.full((1, 1), 2.0**-25), torch.ones(1)
    assert ratio(x + bias, x, one_weight(), None, None, bias) <= 1
    assert error_bound(x, one_weight(), None, None, bias) >= 2.0**-25


def test_the_addition_of_the_bias_counts():
    # the product is rounded, and the sum again: more than one rounding of |xw| + |bias|
    scale = 1 + 2.0**-12 + 2.0**-20
    weight, bias = one_weight(scale=scale), torch.full((1,), 2.0**-13 + 2.0**-30)
    x = near_one(0)
    y = x * scale + bias
    largest = ratio(y, x, weight, None, None, bias)
    assert 0.5 < largest <= 1  # half of two roundings: one would not be enough


def test_the_rank_counts_when_the_expand_is_added_term_by_term():
    rank = 64
    lora = one_adapter(a=2.0**-25, rank=rank)
    x, weight = torch.ones(1, 1), one_weight()
    y = x.clone()
    for _ in range(rank):
        y = y + 2.0**-25  # each is lost
    largest = ratio(y, x, weight, lora, ZERO_IDS)
    assert 0.4 < largest <= 1


def test_the_roundings_of_the_scaling_count():
    # base 0: shrink, cast of the scaling, its product, the expand: four roundings of the delta,
    # which these numbers make go the same way for some x
    weight, a, b = one_weight(code=0), 1 + 830 * 2.0**-23, 1 + 1608 * 2.0**-23
    scaling = 1 + 2247 * 2.0**-23 + 0.99 * 2.0**-24
    x = near_one(1)
    lora, ids = one_adapter(a, b, scaling), torch.zeros(N, dtype=torch.int64)
    y = (x * a) * torch.tensor(scaling).float() * b
    assert 0.6 < ratio(y, x, weight, lora, ids) <= 1  # of n = 5: n = 3 would be exceeded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scale_applied_to_the_sum_is_one_more_rounding(dtype):
    scale = torch.tensor(1 + 2.0**-7).to(dtype).item() + (2.0**-20 if dtype == torch.float32 else 0)
    weight, x = one_weight(code=7, scale=scale, dtype=dtype), near_one(2)
    y = (x * 7) * torch.tensor(scale, dtype=torch.float32)
    assert ratio(y, x, weight, weight_rounded=False) <= 1


UNDERFLOW = [
    # a, b, scaling, accumulate, x: products underflow before a large scaling brings them back
    (1e-30, 1e-30, 1e25, torch.float32),
    (2.0**-12, 2.0**-14, 64.0, torch.float16),
    # the scaling itself leaves the range of float32
    (1e20, 1e20, 1e-46, torch.float32),
]


@pytest.mark.parametrize(("a", "b", "scaling", "accumulate"), UNDERFLOW)
def test_products_that_underflow_before_the_scaling(a, b, scaling, accumulate):
    x, weight, lora = torch.ones(1, 1), one_weight(code=0), one_adapter(a, b, scaling)
    h = (x * a).to(accumulate) * torch.tensor(b).to(accumulate)
    y = (h * torch.tensor(scaling, dtype=torch.float64).to(accumulate)).float()
    operands = (x, weight, lora, ZERO_IDS)
    error = (y.double() - int4_lora_linear(x.double(), *operands[1:])).abs()
    bound = error_bound(*operands, accumulate=accumulate)
    assert (error <= bound).all() or bound.isinf().all()


def test_a_scaling_folded_into_b_may_underflow():
    h, b, scaling = 1024.0, 1.49 * 2.0**-14, 2.0**-10
    x, weight = torch.full((1, 1), h), one_weight(code=0)
    lora = one_adapter(1.0, b, scaling)
    folded = (torch.tensor(b).half() * torch.tensor(scaling).half()) * torch.tensor(h).half()
    assert ratio(folded.float(), x, weight, lora, ZERO_IDS, accumulate=torch.float16) <= 1


def test_the_result_may_be_rounded_to_a_subnormal():
    x, weight = torch.full((1, 1), 2.0**-24, dtype=torch.float16), one_weight(scale=0.5)
    y = int4_linear(x, weight)
    assert y.item() == 0
    for accumulate in (torch.float32, torch.bfloat16):
        assert 0.5 < ratio(y, x, weight, accumulate=accumulate) <= 1


OVERFLOWS = {
    "h": ((1e20, 1e20, 1e-20, 1.0), torch.float32),
    "h in float16": ((1e4, 10.0, 1e-3, 1.0), torch.float16),
    "the scaling": ((1.0, 1e-20, 1e-20, 1e39), torch.float32),
    "the delta before the scaling": ((1e15, 1e15, 1e15, 1e-30), torch.float32),
    "b times the scaling": ((1e-30, 1.0, 1e30, 1e10), torch.float32),
}


@pytest.mark.parametrize("what", OVERFLOWS)
def test_a_number_on_the_way_that_overflows_has_no_bound(what):
    (x, a, b, scaling), accumulate = OVERFLOWS[what]
    operands = (torch.full((1, 1), x), one_weight(), one_adapter(a, b, scaling), ZERO_IDS)
    assert error_bound(*operands, accumulate=accumulate).isinf().all()


def test_the_accumulator_overflows_where_the_result_would_not():
    weight, x = one_weight(columns=2), torch.tensor([[60000.0, -60000.0]])
    assert error_bound(x, weight, accumulate=torch.float16).isinf().all()
    assert error_bound(x, weight).isfinite().all()


def test_a_sum_without_its_scale_overflows():
    weight = one_weight(code=7, scale=1e-3, columns=8, dtype=torch.float16)
    x = torch.full((1, 8), 1500.0)
    declared = {"accumulate": torch.float16, "weight_rounded": False}
    assert error_bound(x, weight, **declared).isinf().all()
    assert error_bound(x, weight, accumulate=torch.float16).isfinite().all()


def test_a_weight_held_in_the_accumulator_may_overflow():
    weight, x = one_weight(code=7, scale=12000.0, columns=8), torch.full((1, 8), 0.01).half()
    declared = {"accumulate": torch.float16, "weight_rounded": False}
    assert error_bound(x, weight, **declared).isinf().all()
    assert error_bound(x, weight, accumulate=torch.float16).isfinite().all()


def test_a_weight_held_in_the_accumulator_may_underflow():
    weight, x = one_weight(code=4, scale=1.1e-8, columns=8), torch.full((1, 8), 1000.0).half()
    y = (x * (torch.tensor(4.0) * 1.1e-8).half()).sum(dim=1, keepdim=True)
    declared = {"accumulate": torch.float16, "weight_rounded": False}
    assert 0.001 < ratio(y, x, weight, **declared) <= 1


def test_a_weight_that_is_flushed():
    weight, x = one_weight(code=7, scale=2.0**-130, columns=8), torch.full((1, 8), 1e30)
    assert ratio(torch.zeros(1, 1), x, weight, weight_rounded=False) <= 1
    assert ratio(torch.zeros(1, 1), x, weight) > 1  # rounded to float32 it is subnormal, not zero


def test_a_sum_that_is_flushed_before_its_scale():
    weight = one_weight(scale=1e30, columns=2)
    x = torch.tensor([[1.5 * 2.0**-126, -(2.0**-126)]])
    assert ratio(torch.zeros(1, 1), x, weight, weight_rounded=False) <= 1


def test_a_rounded_base_may_overflow():
    x, weight = torch.full((1, 1), 60000.0).half(), one_weight(scale=1.5)
    lora = one_adapter(-1.0, dtype=torch.float16)
    assert error_bound(x, weight, lora, ZERO_IDS).isfinite().all()  # 90000 - 60000
    assert error_bound(x, weight, lora, ZERO_IDS, base_rounded=True).isinf().all()


def test_tokens_without_adapter_are_charged_the_base_only():
    x, weight = torch.ones(2, 8), one_weight(columns=8)
    lora = one_adapter(rank=64, columns=8)
    bound = error_bound(x, weight, lora, torch.tensor([-1, 0]))
    assert torch.equal(bound[:1], error_bound(x[:1], weight))
    assert (bound[1] > 5 * bound[0]).all()


def test_a_stack_of_no_adapters_is_charged_the_base_only():
    x, weight, stack = torch.ones(2, 1), one_weight(), one_adapter()
    none = LoRAStack(stack.a[:0], stack.b[:0], stack.scaling[:0])
    bound = error_bound(x, weight, none, torch.tensor([-1, -1]))
    assert torch.equal(bound, error_bound(x, weight))


def test_operands_that_the_layer_refuses_have_no_bound():
    x, weight = torch.ones(1, 1), one_weight()
    with pytest.raises(TypeError, match="bias must not be float64"):
        error_bound(x, weight, bias=torch.ones(1).double())
    with pytest.raises(TypeError, match="weight_rounded must be a bool, got str"):
        error_bound(x, weight, weight_rounded="no")
    with pytest.raises(TypeError, match="must not be float64"):
        error_bound(x, weight, one_adapter(dtype=torch.float64), ZERO_IDS)


def test_a_bound_takes_no_gradient():
    assert not error_bound(torch.ones(1, 1, requires_grad=True), one_weight()).requires_grad
