"""moe_error_bound: never exceeded by a correct result, tight, and exceeded by a wrong one."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional

from int4_lora.reference import (
    ExpertsWeight,
    dequantize,
    error_bound,
    int4_moe,
    moe_error_bound,
    quantize,
)
from int4_lora.reference.bounds import FORMATS, Sums
from int4_lora.reference.dequantization import unrounded_weight
from int4_lora.reference.moe import activated
from int4_lora.reference.moe_bounds import SHARPEST, STEEPEST, _Number, _slope, _Steps
from support.experts import random_experts, random_experts_lora, random_routing
from support.weights import random_x

pytestmark = pytest.mark.versions

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
TOKENS = 512


def problem(dtype, *, hidden=32, inter=32, lora=True, k=2):
    """Return x, experts, ids, weights, adapters and adapter ids."""
    experts = random_experts(hidden=hidden, inter=inter, symmetric=False, dtype=dtype)
    adapters = random_experts_lora(hidden=hidden, inter=inter) if lora else None
    ids = torch.arange(TOKENS) % 4 - 1 if lora else None
    x = random_x(TOKENS, hidden, dtype)
    return (x, experts, *random_routing(TOKENS, k), adapters, ids)


def worst(y, operands, **declared):
    """Return the largest error over its bound."""
    x, *others = operands
    options = {name: declared[name] for name in ("activation", "weights_first") if name in declared}
    error = (y.double() - int4_moe(x.double(), *others, **options)).abs()
    return (error / moe_error_bound(x, *others, **declared)).max().item()


def eager(operands, act=functional.silu, step=lambda y: y, dense=dequantize, into_h=False):
    """Return y of operands without adapters, in float32, the roundings of ``step`` in between."""
    x, experts, topk_ids, topk_weights, *_ = operands
    y = torch.zeros(x.shape)
    for expert in range(experts.count):
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        p = topk_weights[tokens, slots, None].float()
        gate_up = dense(experts.gate_up[expert]).float()
        gate, up = step(x[tokens].float() @ gate_up.T).chunk(2, dim=1)
        h = step(step(act(gate)) * up)
        h = p * h if into_h else h
        result = step(h @ dense(experts.down[expert]).float().T)
        y[tokens] = step(y[tokens] + (result if into_h else step(p * result)))
    return y.to(x.dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("weights_first", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_random_elements_stay_below(dtype, weights_first, activation):
    operands = problem(dtype)
    options = {"activation": activation, "weights_first": weights_first}
    y = int4_moe(*operands, **options)
    ratio = worst(y, operands, **options)
    assert ratio <= 1
    assert ratio >= (0.5 if dtype != torch.float32 else 0.001)


def test_float32_comes_within_a_hundred_times_of_the_bound():
    """Two sums and an activation, none of which errs as far as it may."""
    operands = problem(torch.float32, hidden=8, inter=4, lora=False, k=1)
    assert 1 / 100 <= worst(int4_moe(*operands), operands) <= 1


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_slope_and_curvature_are_the_largest(name):
    g = torch.linspace(-20, 20, 400_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activated(g, name).sum(), g, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), g)
    torch.testing.assert_close(_slope(g.detach(), name), slope.detach(), rtol=1e-9, atol=1e-12)
    assert 0.97 * STEEPEST[name] <= slope.abs().max() <= STEEPEST[name]
    assert 0.97 * SHARPEST[name] <= curvature.abs().max() <= SHARPEST[name]


FORMS = {
    "exp": ("silu", lambda g: g / (1 + torch.exp(-g))),
    "exp2": ("silu", lambda g: g / (1 + torch.exp2(-g * 1.4426950408889634))),
    "sigmoid": ("silu", lambda g: g * torch.sigmoid(g)),
    "tanh of half": ("silu", lambda g: g * 0.5 * (1 + torch.tanh(g * 0.5))),
    "torch's silu": ("silu", functional.silu),
    "torch's gelu": ("gelu_tanh", lambda g: functional.gelu(g, approximate="tanh")),
    "gelu by exp": (
        "gelu_tanh",
        lambda g: g / (1 + torch.exp(-2 * 0.7978845608028654 * (g + 0.044715 * g * g * g))),
    ),
    "gelu by cubes": (
        "gelu_tanh",
        lambda g: g * 0.5 * (1 + torch.tanh(0.7978845608028654 * g * (1 + 0.044715 * g * g))),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_activation_is_within_gamma_8(form):
    name, function = FORMS[form]
    g = torch.cat([torch.linspace(-100, 100, 1_000_001), torch.logspace(-40, 1, 10_001)])
    error = (function(g).double() - activated(g.double(), name)).abs()
    bound = 8 * FORMATS[torch.float32].u * g.double().abs() + 2.0**-125
    assert (error <= bound).all()
    assert (error / bound).max() > 0.05
    assert not ((function(g) + 1e-6).double() - activated(g.double(), name) <= bound).all()


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_the_error_of_the_gate_passes_through_the_activation(name):
    """Every gate within its error, up exact: h stays in its bound, and comes near."""
    g = torch.linspace(-12, 12, 2001, dtype=torch.float64)[:, None]
    steps = _Steps(Sums.of(g, torch.float64), None, weight_rounded=True, joins=0)
    for slack in (1e-3, 0.1, 1.0, 30.0):
        up = _Number.of(torch.full_like(g, 3.0), torch.zeros_like(g))
        h = steps.gated(_Number.of(g, torch.full_like(g, slack)), up, name)
        reached = torch.zeros_like(g)
        for part in torch.linspace(-1, 1, 41).tolist():
            moved = activated(g + part * slack, name) * 3
            reached = torch.maximum(reached, (moved - h.exact).abs())
        assert (reached <= h.error).all()
        assert (reached / h.error).max() > 0.85


def test_errors_of_gate_and_up_together():
    g = torch.linspace(-3, 3, 301, dtype=torch.float64)[:, None]
    steps = _Steps(Sums.of(g, torch.float64), None, weight_rounded=True, joins=0)
    gate, up = _Number.of(g, torch.full_like(g, 0.2)), _Number.of(-g - 1, torch.full_like(g, 0.5))
    h = steps.gated(gate, up, "silu")
    errors = [
        (activated(g + dg, "silu") * (up.exact + dv) - h.exact).abs()
        for dg in (-0.2, 0.2)
        for dv in (-0.5, 0.5)
    ]
    reached = torch.stack(errors).amax(dim=0)
    assert (reached <= h.error).all()
    without = h.exact.abs() * 0 + activated(g, "silu").abs() * 0.5  # up's error alone
    assert (reached > without).any()


def test_honest_variants_are_within_the_bound():
    """Another order of sums, another form of SiLU, the routed weight multiplied into h."""
    operands = problem(torch.float32, lora=False)
    assert worst(eager(operands), operands) <= 1
    assert worst(eager(operands, act=FORMS["tanh of half"][1]), operands) <= 1
    assert worst(eager(operands, into_h=True), operands) <= 1
    x, experts, ids, weights, *_ = operands
    assert worst(int4_moe(x, experts, ids.flip(1), weights.flip(1)), operands) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_steps_are_within_the_bound_only_when_declared(dtype):
    operands = problem(dtype, lora=False)
    y = eager(operands, step=lambda y: y.to(dtype).float())
    assert worst(y, operands, steps_rounded=True) <= 1 < worst(y, operands)
    assert worst(int4_moe(*operands), operands, steps_rounded=True) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_unrounded_weight_is_within_the_bound_only_when_declared(dtype):
    operands = problem(dtype, lora=False)
    y = eager(operands, dense=unrounded_weight)
    assert worst(y, operands, weight_rounded=False) <= 1 < worst(y, operands)
    assert worst(int4_moe(*operands), operands, weight_rounded=False) <= 1


def test_a_float16_accumulator_is_caught_and_can_be_declared():
    operands = problem(torch.float16, hidden=16, inter=16, lora=False)
    y = eager(operands, step=lambda y: y.half().float())
    assert worst(y, operands) > 1
    assert worst(y, operands, accumulate=torch.float16) <= 1


def spoilt(operands, **changed):
    x, experts, ids, weights, *_ = operands
    return int4_moe(x, changed.get("experts", experts), ids, changed.get("weights", weights))


def swapped(experts):
    half = experts.inter
    order = torch.cat([torch.arange(half, 2 * half), torch.arange(half)])
    return ExpertsWeight([weight.rows(order) for weight in experts.gate_up], experts.down)


WRONG = {
    "gate and up swapped": lambda o: spoilt(o, experts=swapped(o[1])),
    "two experts swapped": lambda o: spoilt(
        o, experts=ExpertsWeight(o[1].gate_up, o[1].down[::-1])
    ),
    "weights of one": lambda o: spoilt(o, weights=torch.ones_like(o[3])),
    "weights off by 2^-9": lambda o: spoilt(o, weights=o[3] * (1 + 2.0**-9)),
    "relu": lambda o: eager(o, act=functional.relu),
    "gelu for silu": lambda o: eager(o, act=functional.gelu),
    "sums in bfloat16": lambda o: eager(o, step=lambda y: y.bfloat16().float()),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_outside(name):
    operands = problem(torch.float32, lora=False)
    assert worst(WRONG[name](operands), operands) > 1


def test_a_small_error_of_h_is_carried_by_the_weight_of_down():
    """Where gate and up are exact and down is not summed, the bound is that of the activation."""
    gate_up = quantize(torch.tensor([[1.0], [1.0]]), group_size=None)
    down = quantize(torch.tensor([[1.0]]), group_size=None)
    experts = ExpertsWeight([gate_up], [down])
    ids, weights = torch.zeros(1, 1).long(), torch.ones(1, 1)
    bound = moe_error_bound(torch.ones(1, 1), experts, ids, weights)
    u = FORMATS[torch.float32].u
    assert 5 * u < bound.item() < 30 * u
    assert moe_error_bound(torch.ones(1, 1), experts, ids, 100 * weights) > 99 * bound


def test_float64_operands_are_summed_in_float64():
    operands = problem(torch.float32)
    x, *others = operands
    bound = moe_error_bound(x.double(), *others)
    assert (bound < 1e-8).all()
    assert (bound > 0).all()


def test_a_dropped_token_has_no_error_but_underflow():
    x, experts, ids, weights, *_ = problem(torch.float32, lora=False)
    bound = moe_error_bound(x, experts, torch.full_like(ids, -1), weights)
    assert (bound < 1e-35).all()


def test_tokens_without_adapter_are_charged_the_base_only():
    operands = problem(torch.float32)
    x, experts, ids, weights, _, adapter_ids = operands
    bound = moe_error_bound(*operands)
    base = moe_error_bound(x, experts, ids, weights)
    assert torch.equal(bound[adapter_ids < 0], base[adapter_ids < 0])
    adapted = (adapter_ids >= 0) & ((ids >= 0) & (ids != 2)).any(dim=1)  # expert 2 has none
    assert (bound[adapted] > base[adapted]).all()


@pytest.mark.parametrize("steps_rounded", [False, True])
def test_overflow_has_no_bound(steps_rounded):
    """Only a backend that keeps h in float16 has no bound where h overflows float16."""
    x, experts, ids, weights, *_ = problem(torch.float16, lora=False)
    gate_up = [dataclasses.replace(w, scale=w.scale * 100) for w in experts.gate_up]
    down = [dataclasses.replace(w, scale=w.scale / 1000) for w in experts.down]
    bound = moe_error_bound(
        x, ExpertsWeight(gate_up, down), ids, weights, steps_rounded=steps_rounded
    )
    assert bound.isinf().any() == steps_rounded


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_bound(value):
    x, *others = problem(torch.float32)
    x = x.clone()
    x[0, 0] = value
    bound = moe_error_bound(x, *others)
    assert bound[0].isinf().all()
    assert bound[1:].isfinite().all()


def test_one_linear_expert_is_the_bound_of_down():
    """With the gate at 0 and SiLU's value 0, all that is left is gamma of zeros and underflow."""
    x, experts, ids, weights, *_ = problem(torch.float32, lora=False)
    bound = moe_error_bound(torch.zeros_like(x), experts, ids, weights)
    assert (bound < 1e-30).all()
    assert (error_bound(torch.zeros_like(x), experts.gate_up[0]) < 1e-35).all()


def test_refuses_wrong_declarations():
    operands = problem(torch.float32)
    with pytest.raises(TypeError, match=r"accumulate must be a float dtype, got torch\.int8"):
        moe_error_bound(*operands, accumulate=torch.int8)
    for name in ("weight_rounded", "steps_rounded"):
        with pytest.raises(TypeError, match=f"{name} must be a bool, got int"):
            moe_error_bound(*operands, **{name: 1})
