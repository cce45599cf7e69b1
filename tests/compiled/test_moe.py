"""The compiled experts against the reference, within the bound of their roundings."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from int4_lora.compiled import int4_moe, prepare_experts, prepare_experts_lora
from int4_lora.compiled.moe import bring_rows_together
from int4_lora.integration.conformance.compiled_backend import CompiledBackend
from int4_lora.reference import ExpertsLoRA, ExpertsWeight, moe_error_bound
from int4_lora.reference import int4_moe as definition
from int4_lora.reference.conformance import Backend, run, select, settled
from support.eager_graphs import without_inductor
from support.experts import random_experts, random_experts_lora, random_routing
from support.weights import random_x

pytestmark = pytest.mark.versions

HIDDEN, INTER, EXPERTS = 64, 32, 4
ROUNDED = {"weight_rounded": False, "steps_rounded": True}
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def eager_graphs(monkeypatch):
    without_inductor(monkeypatch)


def problem(
    tokens=9, k=2, dtype=BF16, *, count=EXPERTS, symmetric=True, layout="group", **adapters
):
    """Return x, experts, ids, weights, adapters and adapter ids."""
    experts = random_experts(
        count,
        hidden=HIDDEN,
        inter=INTER,
        groups=2 if layout == "group" else 4,
        layout=layout,
        symmetric=symmetric,
        dtype=dtype,
    )
    lora = random_experts_lora(count, hidden=HIDDEN, inter=INTER, dtype=dtype, **adapters)
    ids, weights = random_routing(tokens, k, count)
    x = random_x(tokens, HIDDEN, dtype) / 4  # so that h stays within float16
    return x, experts, ids, weights, lora, torch.arange(tokens) % 4 - 1


def compiled(x, experts, ids, weights, lora=None, adapter_ids=None, **options):
    lora = None if lora is None else prepare_experts_lora(lora)
    return int4_moe(x, prepare_experts(experts), ids, weights, lora, adapter_ids, **options)


def assert_within(y, operands, **options):
    x, *others = operands
    exact = definition(x.double(), *others, **options)
    bound = moe_error_bound(x, *others, **options, **ROUNDED)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert bound.isfinite().all()
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_within_the_bound(tokens, dtype, symmetric):
    operands = problem(tokens, dtype=dtype, symmetric=symmetric)
    assert_within(compiled(*operands), operands)
    base = operands[:4]
    assert_within(compiled(*base), base)


@pytest.mark.parametrize("layout", ["channel", "g_idx", "g_idx_unbalanced", "tensor", "block"])
def test_every_strategy(layout):
    operands = problem(layout=layout)
    assert_within(compiled(*operands), operands)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_options(activation, weights_first):
    operands = problem()
    options = {"activation": activation, "weights_first": weights_first}
    assert_within(compiled(*operands, **options), operands, **options)


def test_it_conforms():
    backend = Backend(CompiledBackend(), "compiled")
    outcomes = settled(list(run(backend, select("int4_moe/*"))))
    assert [(o.case, o.message) for o in outcomes if o.status == "failed"] == []
    skipped = [o.case for o in outcomes if o.status == "skipped"]
    assert skipped == ["int4_moe/mixed/fp64"]


def test_a_batch_equals_its_rows_one_at_a_time():
    x, experts, ids, weights, lora, adapter_ids = operands = problem(12, dtype=torch.float32)
    batch = compiled(*operands)
    for token in range(12):
        row = slice(token, token + 1)
        alone = compiled(x[row], experts, ids[row], weights[row], lora, adapter_ids[row])
        torch.testing.assert_close(batch[row], alone, rtol=1e-4, atol=1e-5)


def test_unused_experts_are_not_read():
    x, experts, _, weights, lora, adapter_ids = problem()
    nan = [dataclasses.replace(w, scale=w.scale * torch.nan) for w in experts.gate_up]
    spoilt = ExpertsWeight([*experts.gate_up[:2], *nan[2:]], experts.down)
    ids = torch.arange(18).reshape(9, 2) % 2
    y = compiled(x, spoilt, ids, weights, lora, adapter_ids)
    assert torch.equal(y, compiled(x, experts, ids, weights, lora, adapter_ids))


def test_ids_out_of_range_add_nothing():
    x, experts, ids, weights, lora, adapter_ids = problem()
    dropped, high = ids.clone(), ids.clone()
    dropped[3], high[3] = -1, EXPERTS
    expected = compiled(x, experts, dropped, weights, lora, adapter_ids)
    assert torch.equal(compiled(x, experts, high, weights, lora, adapter_ids), expected)
    assert torch.equal(expected[3], torch.zeros(HIDDEN, dtype=BF16))
    beyond = torch.where(adapter_ids < 0, 3, adapter_ids)
    assert torch.equal(compiled(x, experts, dropped, weights, lora, beyond), expected)
    nothing = compiled(x, experts, torch.full_like(ids, -1), weights, lora, adapter_ids)
    assert torch.equal(nothing, torch.zeros_like(x))


def test_no_tokens():
    x, experts, ids, weights, lora, adapter_ids = problem(0)
    assert compiled(x, experts, ids, weights, lora, adapter_ids).shape == (0, HIDDEN)


def test_gradients_are_those_of_the_reference():
    x, experts, ids, weights, lora, adapter_ids = problem(dtype=torch.float32)
    gradients = []
    for function in (compiled, definition):
        leaf, p = x.clone().requires_grad_(), weights.clone().requires_grad_()
        a = lora.gate_up[0].a.clone().requires_grad_()
        b = lora.down[3].b.clone().requires_grad_()
        gate_up = [dataclasses.replace(lora.gate_up[0], a=a), *lora.gate_up[1:]]
        down = [*lora.down[:3], dataclasses.replace(lora.down[3], b=b)]
        y = function(leaf, experts, ids, p, ExpertsLoRA(gate_up, down), adapter_ids)
        gradients.append(torch.autograd.grad(y.square().sum(), [leaf, p, a, b]))
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_of_all_experts_is_dense(symmetric, tokens, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # refuses such modes
    experts = random_experts(
        32, hidden=HIDDEN, inter=INTER, groups=2, dtype=BF16, symmetric=symmetric
    )
    ids, weights = random_routing(tokens, 2, 32)
    x, prepared = random_x(tokens, HIDDEN, BF16), prepare_experts(experts)
    with Largest() as largest:
        y = int4_moe(x, prepared, ids, weights)
    assert_within(y, (x, experts, ids, weights))
    dense = 32 * 2 * INTER * HIDDEN * 4  # of gate and up, in float32
    assert 0 < largest.nbytes < dense / 4


def test_rows_are_brought_together_by_expert_and_adapter():
    ids = torch.tensor([[1, 0], [0, 2], [-1, 0], [0, 3]])
    rows = bring_rows_together(ids, torch.tensor([1, 0, 5, 1]), experts=3, adapters=2)
    # of expert 0: token 2 without an adapter, token 1 with 0, tokens 0 and 3 with 1
    assert rows.tokens.tolist() == [2, 1, 0, 3, 0, 1]
    assert rows.places.tolist() == [5, 2, 1, 6, 0, 3]
    assert rows.pairs.tolist() == [-1, 0, 3, 3, 4, 2]
    assert rows.spans == [(0, 0, 4), (1, 4, 5), (2, 5, 6)]


X, EXPERTS_WEIGHT, IDS, WEIGHTS, LORA, ADAPTER_IDS = problem()
PREPARED, PREPARED_LORA = prepare_experts(EXPERTS_WEIGHT), prepare_experts_lora(LORA)
REFUSED = [
    (TypeError, r"got ExpertsWeight: call prepare_experts\(\)", {"experts": EXPERTS_WEIGHT}),
    (TypeError, r"got ExpertsLoRA: call prepare_experts_lora\(\)", {"lora": LORA}),
    (TypeError, "x must be float16", {"x": X.long()}),
    (ValueError, r"x must be \[tokens, hidden\] = \[\*, 64\]", {"x": X[:, 1:]}),
    (TypeError, "topk_ids must be int32 or int64", {"topk_ids": WEIGHTS}),
    (ValueError, r"topk_ids must be \[tokens, k\]", {"topk_ids": IDS[1:]}),
    (ValueError, "got k = 0", {"topk_ids": IDS[:, :0], "topk_weights": WEIGHTS[:, :0]}),
    (ValueError, r"topk_weights must be \[tokens, k\]", {"topk_weights": WEIGHTS[:, 1:]}),
    (TypeError, "topk_weights must not be float64", {"topk_weights": WEIGHTS.double()}),
    (ValueError, "adapter_ids must be given with lora", {"adapter_ids": None}),
    (ValueError, r"adapter_ids must be \[tokens\]", {"adapter_ids": ADAPTER_IDS[1:]}),
    (ValueError, "activation must be one of", {"activation": "relu"}),
    (TypeError, "weights_first must be a bool", {"weights_first": None}),
    (
        ValueError,
        "lora must be for 4 experts, got 2",
        {"lora": prepare_experts_lora(random_experts_lora(2, hidden=HIDDEN, inter=INTER))},
    ),
    (ValueError, "all operands must be on one device", {"topk_ids": IDS.to("meta")}),
]


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED)
def test_refuses(error, message, changed):
    given = {
        "x": X,
        "experts": PREPARED,
        "topk_ids": IDS,
        "topk_weights": WEIGHTS,
        "lora": PREPARED_LORA,
        "adapter_ids": ADAPTER_IDS,
    }
    with pytest.raises(error, match=message):
        int4_moe(**{**given, **changed})
