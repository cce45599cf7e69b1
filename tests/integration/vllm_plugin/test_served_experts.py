"""The state of a layer of experts: what it computes, by which code, and with which slots."""

import pytest
import torch

from int4_lora.compiled import prepare_experts
from int4_lora.integration.vllm_plugin import load_check
from int4_lora.integration.vllm_plugin.options import Options
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.served_experts import ServedExperts, expert_slots
from int4_lora.reference import int4_moe, moe_error_bound
from support.experts import random_experts, random_routing

BF16 = torch.bfloat16
COUNT, HIDDEN, INTER, SLOTS, RANK = 4, 64, 32, 3, 4
COLD = Options(warm_up=False)


@pytest.fixture(scope="module")
def experts():
    return random_experts(COUNT, hidden=HIDDEN, inter=INTER, groups=1, dtype=BF16)


def served(experts, **engine):
    state = ServedExperts("model.experts", ServedEngine(options=COLD, **engine), int4=True, top_k=2)
    weight = prepare_experts(experts)
    assert state.fault(experts, weight) is None
    state.hold(weight)
    return state


def slots_of_vllm(parts=2):
    """Return vLLM's slots, as its LoRA layer makes them: zeros, B transposed in memory."""

    def pair(outputs, columns):
        a = torch.zeros(SLOTS, COUNT, RANK, columns, dtype=BF16)
        b = torch.zeros(SLOTS, COUNT, RANK, outputs, dtype=BF16).transpose(2, 3)
        return a, b

    gate_up = [pair(2 * INTER // parts, HIDDEN) for _ in range(parts)]
    return gate_up, pair(HIDDEN, INTER)


def fill(gate_up, down, slot, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for a, b in (*gate_up, down):
        a[slot] = torch.randn(a[slot].shape, generator=generator) / 8
        b[slot] = torch.randn(b[slot].shape, generator=generator) / 8


def operands(tokens=7):
    ids, weights = random_routing(tokens, count=COUNT)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(BF16)
    return x, ids, weights


def assert_right(y, x, experts, ids, weights, lora=None, adapter_ids=None):
    truth = int4_moe(x.double(), experts, ids, weights.double(), lora, adapter_ids)
    flags = {"weight_rounded": False, "steps_rounded": True}
    bound = moe_error_bound(x, experts, ids, weights, lora, adapter_ids, **flags)
    assert y.dtype == BF16
    assert ((y.double() - truth).abs() <= bound).all()


def test_experts_are_the_references(experts):
    x, ids, weights = operands()
    y = served(experts).forward(x, ids.int(), weights, None)
    assert_right(y, x, experts, ids, weights)


@pytest.mark.parametrize("parts", [1, 2])
def test_what_vllm_writes_to_slots_is_what_is_computed_with(experts, parts):
    state = served(experts, slots=SLOTS, rank=RANK)
    gate_up, down = slots_of_vllm(parts)
    state.read_slots(expert_slots(gate_up, down))
    assert state.lora_fallback_reason is None
    for slot in (0, 2):
        fill(gate_up, down, slot, seed=slot)
        state.slots.note(slot, RANK)
    x, ids, weights = operands()
    adapter_ids = torch.tensor([0, -1, 2, 2, 1, 0, SLOTS])  # slot 1 is empty, SLOTS is no slot
    y = state.forward(x, ids, weights, adapter_ids)
    lora = state.slots.at_ranks[-1].experts_lora()
    known = torch.tensor([0, -1, 2, 2, 1, 0, -1])
    assert_right(y, x, experts, ids, weights, lora, known)
    base = state.forward(x, ids, weights, None)
    assert torch.equal(y[[1, 4, 6]], base[[1, 4, 6]])
    assert not torch.equal(y[[0, 2]], base[[0, 2]])
    assert torch.equal(state.forward(x, ids, weights, torch.full((7,), -1)), base)


def test_experts_of_an_adapter_are_told_apart(experts):
    """A lies expert by expert in each slot: the pair of slot s and expert e is s * experts + e."""
    gate_up, down = slots_of_vllm()
    slots = expert_slots(gate_up, down)
    gate_up[1][0][2, 3] = 7
    assert (slots.gate_up.slices[1].a[2 * COUNT + 3] == 7).all()
    assert slots.gate_up.slices[1].start == INTER
    down[1][1, 2] = 5
    assert (slots.down.slices[0].bt[COUNT + 2] == 5).all()
    lora = slots.experts_lora()
    assert (lora.slices("gate_up", 3)[1].stack.a[2] == 7).all()
    assert (lora.slices("down", 2)[0].stack.b[1] == 5).all()
    assert int(lora.slices("down", 2)[0].stack.b.count_nonzero()) == HIDDEN * RANK


def test_a_b_that_is_not_finite_stays_with_its_tokens(experts):
    state = served(experts, slots=SLOTS, rank=RANK)
    gate_up, down = slots_of_vllm()
    state.read_slots(expert_slots(gate_up, down))
    for slot in (0, 1):
        fill(gate_up, down, slot, seed=slot)
        state.slots.note(slot, RANK)
    down[1][1] = torch.nan
    state.slots.note_finite(1, False)
    x, ids, weights = operands(tokens=40)  # enough for products with all adapters side by side
    adapter_ids = torch.arange(40) % 2
    y = state.forward(x, ids, weights, adapter_ids)
    assert y[::2].isfinite().all()
    assert not y[1::2].isfinite().any()


def test_experts_that_fail_the_check_are_computed_by_the_reference(experts, monkeypatch):
    real = load_check.int4_moe

    def swapped(x, weight, ids, *others, **options):
        return real(x, weight, ids.flip(1), *others, **options)

    monkeypatch.setattr(load_check, "int4_moe", swapped)
    state = ServedExperts("model.experts", ServedEngine(options=COLD), int4=True, top_k=2)
    weight = prepare_experts(experts)
    fault = state.fault(experts, weight)
    assert fault is not None
    assert "bounds away" in fault
    state.compute_plainly(experts)
    x, ids, weights = operands()
    y = state.forward(x, ids, weights, None)
    assert torch.equal(y, int4_moe(x, experts, ids, weights))
    gate_up, down = slots_of_vllm()
    state.read_slots(expert_slots(gate_up, down))
    fill(gate_up, down, 1)
    state.slots.note(1, RANK)
    adapter_ids = torch.tensor([1, -1, SLOTS, 1, -1, 1, 1])
    lora = state.slots.at_ranks[-1].experts_lora()
    y = state.forward(x, ids, weights, adapter_ids)
    known = torch.where(adapter_ids < SLOTS, adapter_ids, -1)
    assert torch.equal(y, int4_moe(x, experts, ids, weights, lora, known))


def test_adapters_that_fail_the_check_are_computed_by_the_reference(experts, monkeypatch):
    state = served(experts, slots=SLOTS, rank=RANK)
    real = load_check.int4_moe

    def dropped(x, weight, ids, p, lora, adapter_ids, **options):
        return real(x, weight, ids, p, None, None, **options)

    monkeypatch.setattr(load_check, "int4_moe", dropped)
    gate_up, down = slots_of_vllm()
    state.read_slots(expert_slots(gate_up, down))
    assert "bounds away" in state.lora_fallback_reason
    assert state.weight is None
    fill(gate_up, down, 0)
    state.slots.note(0, RANK)
    x, ids, weights = operands()
    adapter_ids = torch.zeros(7, dtype=torch.int64)
    y = state.forward(x, ids, weights, adapter_ids)
    lora = state.slots.at_ranks[-1].experts_lora()
    assert torch.equal(y, int4_moe(x, experts, ids, weights, lora, adapter_ids))


def test_a_layout_of_other_bits_fails_the_check(experts):
    other = random_experts(COUNT, hidden=HIDDEN, inter=INTER, groups=1, dtype=BF16)
    other.down[2].packed[0, 0] ^= 1
    state = ServedExperts("model.experts", ServedEngine(options=COLD), int4=True, top_k=2)
    fault = state.fault(other, prepare_experts(experts))
    assert fault == "the layout of down of expert 2 does not give its bits back"


def test_ranks_of_a_batch():
    gate_up, down = (
        [
            (torch.zeros(2, COUNT, 64, columns), torch.zeros(2, COUNT, outputs, 64))
            for outputs, columns in shapes
        ]
        for shapes in (((INTER, HIDDEN), (INTER, HIDDEN)), ((HIDDEN, INTER),))
    )
    state = ServedExperts("model.experts", ServedEngine(), plain=object())
    state.read_slots(expert_slots(gate_up, down[0]))
    slots = state.slots
    assert slots.of_batch(torch.tensor([0, 1, -1])) is None
    slots.note(0, 8)
    slots.note(1, 20)
    for ids, rank in (([0, -1], 16), ([0, 1], 32)):
        lora = slots.of_batch(torch.tensor(ids))
        assert lora.gate_up.slices[0].rank == lora.down.slices[0].rank == rank
    slots.note_unknown(0)
    assert slots.of_batch(torch.tensor([0])).down.slices[0].rank == 64
    slots.note(0, 0)
    assert slots.of_batch(torch.tensor([0])) is None
    slots.note_finite(1, False)
    assert not any(part.finite for lora in slots.at_ranks for part in lora.gate_up.slices)


@pytest.mark.parametrize(
    ("plain", "weight", "reason", "line"),
    [
        (None, object(), None, "2 of 2 layers of experts by int4_lora (INT4, adapters)"),
        (
            object(),
            None,
            "a fault",
            "0 of 2 layers of experts by int4_lora (INT4, adapters); 2 by the reference, slowly: "
            "2 a fault",
        ),
        (
            None,
            None,
            "on a GPU",
            "0 of 2 layers of experts by int4_lora (INT4, adapters); 2 by vLLM: 2 on a GPU",
        ),
    ],
)
def test_the_log_counts_them(plain, weight, reason, line):
    engine = ServedEngine()
    assert len(engine.summary()) == 1
    for name in ("a", "b"):
        state = ServedExperts(name, engine, plain=plain, weight=weight, fallback_reason=reason)
        engine.experts.append(state)
    assert engine.summary()[1] == line
