"""The experts of one token against the reference, within the bound of their roundings."""

import dataclasses

import pytest
import torch

from int4_lora.compiled import int4_moe, prepare_experts, prepare_experts_lora
from int4_lora.compiled import one_token_experts as module
from int4_lora.compiled.layouts.int4pack import block_rows
from int4_lora.compiled.prepared_experts import PreparedExperts
from int4_lora.reference import ExpertsWeight, moe_error_bound
from int4_lora.reference import int4_moe as definition
from support.eager_graphs import without_inductor
from support.experts import random_experts, random_experts_lora
from support.weights import random_x

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(block_rows() is None, reason="no INT4 operator whose layout is known"),
]

SIZES = {"hidden": 128, "inter": 64}
BF16 = torch.bfloat16
EXPERTS = random_experts(4, **SIZES, groups=2, dtype=BF16)
LORA = random_experts_lora(4, **SIZES, dtype=BF16)
PREPARED, PREPARED_LORA = prepare_experts(EXPERTS), prepare_experts_lora(LORA)
X = random_x(1, SIZES["hidden"], BF16) / 4
P = torch.tensor([[0.7, 0.2, 0.4]])


@pytest.fixture(autouse=True)
def eager_graphs(monkeypatch):
    without_inductor(monkeypatch)


@pytest.fixture
def taken(monkeypatch):
    """Return the list of the calls that took the path of one token."""
    calls, one_token = [], module.one_token

    def noted(*operands):
        calls.append(operands)
        return one_token(*operands)

    monkeypatch.setattr("int4_lora.compiled.moe.one_token", noted)
    return calls


def assert_within(y, x, *others, **options):
    exact = definition(x.double(), *others, **options)
    rounded = {"weight_rounded": False, "steps_rounded": True}
    bound = moe_error_bound(x, *others, **options, **rounded)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("adapter", [-1, 0, 1])
@pytest.mark.parametrize("chosen", [(2, 0, 1), (-1, 3, 1), (1, 3, 1)])
def test_within_the_bound(chosen, adapter, activation, taken):
    ids, of_token = torch.tensor([chosen]), torch.tensor([adapter])
    y = int4_moe(X, PREPARED, ids, P, PREPARED_LORA, of_token, activation=activation)
    assert_within(y, X, EXPERTS, ids, P, LORA, of_token, activation=activation)
    base = int4_moe(X, PREPARED, ids, P, activation=activation)
    assert_within(base, X, EXPERTS, ids, P, activation=activation)
    assert torch.equal(y, base) == (adapter == -1)
    assert len(taken) == 2


def test_ids_out_of_range_add_nothing(taken):
    p = torch.tensor([[0.7, torch.nan, 0.4]])
    expected = int4_moe(X, PREPARED, torch.tensor([[2, -1, 1]]), p)
    assert expected.isfinite().all()
    assert torch.equal(int4_moe(X, PREPARED, torch.tensor([[2, 4, 1]]), p), expected)
    ids, beyond = torch.tensor([[2, 4, 1]]), torch.tensor([PREPARED_LORA.adapters])
    assert torch.equal(int4_moe(X, PREPARED, ids, p, PREPARED_LORA, beyond), expected)
    nothing = int4_moe(X, PREPARED, torch.tensor([[-1, 4, -1]]), P, PREPARED_LORA, beyond - 1)
    assert torch.equal(nothing, torch.zeros_like(X))
    assert len(taken) == 4


def test_unused_experts_are_not_read(taken):
    nan = dataclasses.replace(EXPERTS.gate_up[3], scale=EXPERTS.gate_up[3].scale * torch.nan)
    spoilt = prepare_experts(ExpertsWeight([*EXPERTS.gate_up[:3], nan], EXPERTS.down))
    ids = torch.tensor([[2, 0, 1]])
    assert torch.equal(int4_moe(X, spoilt, ids, P), int4_moe(X, PREPARED, ids, P))
    assert len(taken) == 2


def test_it_takes_one_token_of_experts_that_are_alike():
    other = prepare_experts(random_experts(4, **SIZES, groups=1, dtype=BF16))
    mixed = PreparedExperts((*PREPARED.gate_up[:3], other.gate_up[3]), PREPARED.down)
    assert module.takes_one_token(X, PREPARED, P, PREPARED_LORA)
    assert not module.takes_one_token(X.expand(2, -1), PREPARED, P, PREPARED_LORA)
    assert not module.takes_one_token(X, mixed, P, None)
    assert not module.takes_one_token(X.float(), PREPARED, P, None)  # not in the scales' dtype
    for operands in ((X.clone().requires_grad_(), P), (X, P.clone().requires_grad_())):
        assert not module.takes_one_token(operands[0], PREPARED, operands[1], None)
