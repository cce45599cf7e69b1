"""int4_moe: truth, routing, adapters, gradients, refusals."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from int4_lora.reference import (
    ExpertsLoRA,
    ExpertsWeight,
    LoRAStack,
    dequantize,
    int4_moe,
    moe_error_bound,
)
from support import scalar
from support.experts import (
    HIDDEN,
    INTER,
    random_experts,
    random_experts_lora,
    random_routing,
)
from support.weights import random_x

pytestmark = pytest.mark.versions

EXPERTS = random_experts(symmetric=False)
LORA = random_experts_lora()
X = random_x(tokens=7, columns=HIDDEN)
ROUTING = random_routing()
IDS = torch.tensor([0, -1, 2, 1, 2, -1, 0])
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("weights_first", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("layout", ["group", "channel", "g_idx_unbalanced", "block", "tensor"])
def test_float64_is_the_truth(layout, activation, weights_first):
    experts = random_experts(layout=layout, symmetric=False)
    options = {"activation": activation, "weights_first": weights_first}
    y = int4_moe(X.double(), experts, *ROUTING, LORA, IDS, **options)
    expected = scalar.moe(X, experts, *ROUTING, LORA, IDS, activation, weights_first)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, torch.from_numpy(expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_dtype_of_x_is_within_the_bound(dtype):
    x = X.to(dtype)
    y = int4_moe(x, EXPERTS, *ROUTING, LORA, IDS)
    assert y.dtype == dtype
    exact = int4_moe(x.double(), EXPERTS, *ROUTING, LORA, IDS)
    bound = moe_error_bound(x, EXPERTS, *ROUTING, LORA, IDS)
    assert bound.isfinite().all()
    assert ((y.double() - exact).abs() <= bound).all()


def by_hand(gate, up, p):
    return p * (gate / (1 + torch.tensor(-gate).double().exp().item()) * up)


def test_one_weight_by_hand():
    """Codes 1 and scales 2 and 3: gate = 2 x, up = 3 x, down = the identity."""
    one = torch.tensor([[-2004318071], [-2004318071]], dtype=torch.int32)  # codes 1
    gate_up = dataclasses.replace(
        EXPERTS.gate_up[0],
        packed=one,
        scale=torch.tensor([[2.0], [3.0]]),
        shape=(2, 1),
        zero_point=None,
    )
    down = dataclasses.replace(gate_up, packed=one[:1], scale=torch.ones(1, 1), shape=(1, 1))
    experts = ExpertsWeight([gate_up], [down])
    x = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    y = int4_moe(x, experts, torch.tensor([[0], [0]]), torch.tensor([[0.25], [1.0]]))
    assert y.flatten().tolist() == pytest.approx([by_hand(1.0, 1.5, 0.25), by_hand(-4.0, -6.0, 1)])


def test_the_same_expert_twice_counts_twice():
    ids, weights = torch.tensor([[1, 1]] * 7), torch.tensor([[0.25, 0.5]] * 7)
    twice = int4_moe(X.double(), EXPERTS, ids, weights)
    once = int4_moe(X.double(), EXPERTS, ids[:, :1], torch.full((7, 1), 0.75))
    torch.testing.assert_close(twice, once, rtol=1e-13, atol=1e-13)


def test_dropped_experts_add_nothing_and_are_not_read():
    ids, weights = ROUTING
    weights = weights.clone()
    weights[2, 0] = float("nan")  # ids[2, 0] is -1
    y = int4_moe(X, EXPERTS, ids, weights, LORA, IDS)
    assert torch.equal(y, int4_moe(X, EXPERTS, *ROUTING, LORA, IDS))
    alone = int4_moe(X[2:3], EXPERTS, ids[2:3, 1:], weights[2:3, 1:], LORA, IDS[2:3])
    torch.testing.assert_close(y[2:3], alone, rtol=1e-5, atol=1e-6)
    none = int4_moe(X, EXPERTS, torch.full_like(ids, -1), weights, LORA, IDS)
    assert torch.equal(none, torch.zeros_like(X))


def test_an_unused_expert_may_be_nan():
    nan = dataclasses.replace(
        EXPERTS.down[3], scale=torch.full_like(EXPERTS.down[3].scale, torch.nan)
    )
    experts = ExpertsWeight(EXPERTS.gate_up, [*EXPERTS.down[:3], nan])
    ids, weights = random_routing(count=3)
    assert torch.equal(int4_moe(X, experts, ids, weights), int4_moe(X, EXPERTS, ids, weights))
    ids[4, 1], weights[4, 1] = 3, 0.0
    y = int4_moe(X, experts, ids, weights)
    assert y.isnan().any(dim=1).tolist() == [row == 4 for row in range(7)]  # 0 * NaN is NaN


def test_a_nan_of_an_adapter_or_token_stays_there():
    gate_up = list(LORA.gate_up)
    a = gate_up[0].a.clone()
    a[2] = torch.nan
    gate_up[0] = dataclasses.replace(gate_up[0], a=a)
    x = X.clone()
    x[1] = torch.nan
    ids = torch.zeros(7, 1, dtype=torch.int64)
    y = int4_moe(x, EXPERTS, ids, torch.ones(7, 1), ExpertsLoRA(gate_up, LORA.down), IDS)
    expected = [token in (1, 2, 4) for token in range(7)]  # the token, and those of adapter 2
    assert y.isnan().all(dim=1).tolist() == expected
    assert y.isnan().any(dim=1).tolist() == expected


def test_the_sum_is_in_the_order_of_the_slots():
    """1e8 + 1 - 1e8 in float32 is 0, in the other order 1."""
    down = [dataclasses.replace(EXPERTS.down[0], scale=EXPERTS.down[0].scale, zero_point=None)] * 3
    experts = ExpertsWeight([EXPERTS.gate_up[0]] * 3, down)
    x, ids = X[:1], torch.tensor([[0, 1, 2]])
    unit = int4_moe(x, experts, ids[:, :1], torch.ones(1, 1))
    weights = torch.tensor([[2.0**30, 1.0, -(2.0**30)]])
    y = int4_moe(x, experts, ids, weights)
    in_order = (unit * 2.0**30 + unit) - unit * 2.0**30
    assert torch.equal(y, in_order)
    swapped = int4_moe(x, experts, ids, weights[:, [0, 2, 1]])
    assert torch.equal(swapped, unit)
    assert not torch.equal(y, swapped)


@given(st.lists(st.integers(-1, 2), min_size=0, max_size=6), st.integers(1, 4))
def test_a_batch_equals_its_rows_one_at_a_time(adapter_ids, k):
    count = len(adapter_ids)
    x, adapter_ids = random_x(count, HIDDEN, torch.float64), torch.tensor(adapter_ids).long()
    ids, weights = random_routing(count, k)
    batch = int4_moe(x, EXPERTS, ids, weights, LORA, adapter_ids)
    assert batch.shape == (count, HIDDEN)
    for token in range(count):
        row = slice(token, token + 1)
        alone = int4_moe(x[row], EXPERTS, ids[row], weights[row], LORA, adapter_ids[row])
        torch.testing.assert_close(batch[row], alone, rtol=1e-12, atol=1e-12)


def test_adapters_are_the_merged_weights():
    """The adapters of an expert equal dense experts with scaling * B A added."""
    x, (ids, weights) = X.double(), random_routing(dropped=False)
    y = int4_moe(x, EXPERTS, ids, weights, LORA, torch.full((7,), 1))
    expected = torch.zeros_like(x)
    for token in range(7):
        for expert, p in zip(ids[token].tolist(), weights[token].double(), strict=True):
            gate_up = merged(EXPERTS.gate_up[expert], LORA.slices("gate_up", expert)) @ x[token]
            h = torch.nn.functional.silu(gate_up[:INTER]) * gate_up[INTER:]
            expected[token] += p * (merged(EXPERTS.down[expert], LORA.slices("down", expert)) @ h)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


def merged(weight, slices):
    dense = dequantize(weight, torch.float64)
    for part in slices:
        a, b = part.stack.a[1].double(), part.stack.b[1].double()
        dense[part.start : part.stop] += part.stack.scaling[1] * (b @ a)
    return dense


def test_no_adapters_is_the_base():
    base = int4_moe(X, EXPERTS, *ROUTING)
    for lora, ids in (
        (LORA, torch.full((7,), -1)),
        (ExpertsLoRA(), torch.full((7,), -1)),
        (None, torch.full((7,), -1)),
        (ExpertsLoRA([None] * 4, [None] * 4), torch.full((7,), -1)),
    ):
        assert torch.equal(int4_moe(X, EXPERTS, *ROUTING, lora, ids), base)
    mixed = int4_moe(X, EXPERTS, *ROUTING, LORA, IDS)
    assert torch.equal(mixed[IDS == -1], base[IDS == -1])


def test_gradients_are_right():
    """Of x, the routed weights, and an A that two experts share."""
    experts, (ids, weights) = random_experts(3, hidden=8, inter=4), random_routing(3, count=3)
    generator = torch.Generator().manual_seed(0)
    x, a, b, down_b = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 8), (2, 2, 8), (2, 8, 2), (2, 8, 2))
    )
    weights = weights.double().requires_grad_()
    scaling = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def y(x, a, b, down_b, weights):
        gate_up = [LoRAStack(a, b, scaling), LoRAStack(a, 2 * b, scaling), None]
        down = [None, LoRAStack(a[:, :, :4], down_b, scaling), None]
        lora = ExpertsLoRA(gate_up, down)
        return int4_moe(x, experts, ids, weights, lora, torch.tensor([0, -1, 1]))

    assert torch.autograd.gradcheck(y, (x, a, b, down_b, weights))


def test_no_tokens():
    ids, weights = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 2)
    y = int4_moe(X[:0], EXPERTS, ids, weights, LORA, torch.zeros(0, dtype=torch.int64))
    assert y.shape == (0, HIDDEN)
    assert y.dtype == torch.float32


def test_autocast_changes_nothing():
    expected = int4_moe(X, EXPERTS, *ROUTING, LORA, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int4_moe(X, EXPERTS, *ROUTING, LORA, IDS), expected)


TOPK_IDS, TOPK_WEIGHTS = ROUTING
REFUSED = [
    (TypeError, "experts must be an ExpertsWeight, got tuple", {"experts": EXPERTS.gate_up}),
    (TypeError, r"x must be float16, .*, got int64", {"x": X.long()}),
    (ValueError, r"x must be \[tokens, hidden\] = \[\*, 32\]", {"x": X[:, :31]}),
    (TypeError, "topk_ids must be int32 or int64, got float32", {"topk_ids": TOPK_WEIGHTS}),
    (ValueError, r"topk_ids must be \[tokens, k\] = \[7, \*\]", {"topk_ids": TOPK_IDS[:6]}),
    (
        ValueError,
        r"topk_ids must be in \[-1, 4\).*, got 4",
        {"topk_ids": TOPK_IDS.clamp(min=1) + 1},
    ),
    (ValueError, r"topk_ids must be in \[-1, 4\).*, got -2", {"topk_ids": TOPK_IDS - 1}),
    (
        ValueError,
        "topk_ids must choose between 1 and all 4 experts for each token, got k = 5",
        {"topk_ids": torch.zeros(7, 5).long(), "topk_weights": torch.ones(7, 5)},
    ),
    (
        ValueError,
        "got k = 0",
        {"topk_ids": torch.zeros(7, 0).long(), "topk_weights": torch.ones(7, 0)},
    ),
    (TypeError, "topk_weights must be float16", {"topk_weights": TOPK_IDS}),
    (ValueError, r"topk_weights must be .* = \[7, 2\], got", {"topk_weights": TOPK_WEIGHTS[:, :1]}),
    (
        TypeError,
        "topk_weights must not be float64 where x is float32",
        {"topk_weights": TOPK_WEIGHTS.double()},
    ),
    (ValueError, "activation must be one of", {"activation": "relu"}),
    (TypeError, "weights_first must be a bool, got int", {"weights_first": 1}),
    (TypeError, "lora must be an ExpertsLoRA, got LoRAStack", {"lora": LORA.gate_up[0]}),
    (ValueError, "adapter_ids must be given with lora, got None", {"adapter_ids": None}),
    (ValueError, r"adapter_ids must be in \[-1, 3\)", {"adapter_ids": IDS + 1}),
    (ValueError, r"adapter_ids must be in \[-1, 0\)", {"lora": None}),
    (ValueError, r"adapter_ids must be \[tokens\] = \[7\]", {"adapter_ids": IDS[:3]}),
    (
        ValueError,
        "lora.gate_up must have an entry for each of the 4 experts, got 3",
        {"lora": ExpertsLoRA(LORA.gate_up[:3])},
    ),
    (
        TypeError,
        r"a and b of lora.gate_up\[0\] must not be float64 where x is float32",
        {"lora": random_experts_lora(dtype=torch.float64)},
    ),
    (ValueError, "all operands must be on one device", {"topk_ids": TOPK_IDS.to("meta")}),
]


@pytest.mark.parametrize("function", [int4_moe, moe_error_bound])
@pytest.mark.parametrize(("error", "message", "changed"), REFUSED)
def test_refuses(error, message, changed, function):
    given = {
        "x": X,
        "experts": EXPERTS,
        "topk_ids": TOPK_IDS,
        "topk_weights": TOPK_WEIGHTS,
        "lora": LORA,
        "adapter_ids": IDS,
        **changed,
    }
    with pytest.raises(error, match=message):
        function(**given)
