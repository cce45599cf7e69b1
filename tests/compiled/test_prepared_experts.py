"""prepare_experts keeps every bit; prepare_experts_lora lays out a pair for adapter and expert."""

import dataclasses

import pytest
import torch

from int4_lora.compiled import prepare_experts, prepare_experts_lora
from int4_lora.reference import ExpertsLoRA, LoRASlice
from support.experts import HIDDEN, INTER, random_experts, random_experts_lora
from support.weights import bits_of, narrow

pytestmark = pytest.mark.versions

LORA = random_experts_lora()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_checkpoints_tensors_come_back_bit_for_bit(symmetric):
    experts = random_experts(3, hidden=64, inter=32, groups=2, symmetric=symmetric)
    prepared = prepare_experts(experts)
    assert (prepared.count, prepared.hidden, prepared.inter) == (3, 64, 32)
    back = prepared.experts_weight()
    for name in ("gate_up", "down"):
        for ours, theirs in zip(getattr(experts, name), getattr(back, name), strict=True):
            assert torch.equal(ours.packed, theirs.packed)
            assert torch.equal(bits_of(ours.scale), bits_of(theirs.scale))
            assert (ours.zero_point is None) == (theirs.zero_point is None)
            if ours.zero_point is not None:
                assert torch.equal(ours.zero_point, theirs.zero_point)
    assert prepared.nbytes <= 1.13 * experts.nbytes


def test_the_layout_can_be_chosen():
    experts = random_experts(2, hidden=64, inter=32, groups=2)
    named = {type(weight).__name__ for weight in prepare_experts(experts, layout="checkpoint").down}
    assert named == {"CheckpointWeight"}
    with pytest.raises(ValueError, match="layout must be one of"):
        prepare_experts(experts, layout="none")


def test_the_pair_of_an_adapter_and_an_expert():
    """The pair a * experts + e; expert 1 has gate and up apart, so all are cut at inter."""
    prepared = prepare_experts_lora(LORA)
    assert (prepared.adapters, prepared.experts) == (3, 4)
    gate, up = prepared.gate_up.slices
    assert (gate.start, gate.stop, up.start, up.stop) == (0, INTER, INTER, 2 * INTER)
    whole, (apart_up, apart_gate) = LORA.gate_up[3], LORA.gate_up[1]
    for adapter in range(3):
        pair = adapter * 4 + 3
        for part, rows in ((gate, slice(0, INTER)), (up, slice(INTER, None))):
            assert torch.equal(part.a[pair], whole.a[adapter])
            assert torch.equal(part.bt[pair], whole.b[adapter, rows].T)
            assert part.scaling[pair] == whole.scaling[adapter]
        pair = adapter * 4 + 1
        assert torch.equal(gate.a[pair], apart_gate.stack.a[adapter])
        assert torch.equal(up.bt[pair], apart_up.stack.b[adapter].T)
        assert not gate.a[adapter * 4 + 2].any()  # expert 2 has none
    (down,) = prepared.down.slices
    assert torch.equal(down.a[2 * 4], LORA.down[0].a[2])


def test_the_adapters_come_back():
    """As pairs of the same deltas: cut at inter, those of expert 2 zeros."""
    back = prepare_experts_lora(LORA).experts_lora()
    assert (back.adapters, back.count) == (3, 4)
    for name in ("gate_up", "down"):
        for expert in range(4):
            given = LORA.slices(name, expert)
            rows = {"gate_up": 2 * INTER, "down": HIDDEN}[name]
            assert torch.equal(deltas(back.slices(name, expert), rows), deltas(given, rows))


def deltas(slices, rows):
    """Return ``scaling * b @ a`` of the three adapters: exact, whatever the rank is padded to."""
    columns = slices[0].stack.a.shape[2] if slices else 0
    total = torch.zeros(3, rows, max(columns, 1), dtype=torch.float64)
    for part in slices:
        stack = part.stack
        scaled = stack.scaling.double()[:, None, None] * stack.b.double()
        for step in range(stack.rank):  # one after the other, so that zeros change no rounding
            total[:, part.start : part.stop] += scaled[:, :, step, None] * stack.a[:, None, step]
    return total if total.any() else torch.zeros(3, rows, 1, dtype=torch.float64)


def test_smaller_ranks_are_padded():
    smaller = random_experts_lora(rank=2).down[0]
    (part,) = prepare_experts_lora(ExpertsLoRA(down=[smaller, LORA.down[1]])).down.slices
    assert part.rank == 4
    assert torch.equal(part.a[0, :2], smaller.a[0])
    assert not part.a[0, 2:].any()


def test_the_bytes_are_those_of_the_adapters():
    lora = ExpertsLoRA(down=[LORA.down[0]] * 4)
    stack = LORA.down[0]
    floats = 4 * (stack.a.numel() + stack.b.numel()) * 4
    assert prepare_experts_lora(lora).nbytes == floats + 4 * 3 * 8
    assert prepare_experts_lora(lora).gate_up is None


def test_refuses():
    with pytest.raises(TypeError, match="experts must be an ExpertsWeight, got list"):
        prepare_experts([])
    with pytest.raises(TypeError, match="lora must be an ExpertsLoRA, got LoRAStack"):
        prepare_experts_lora(LORA.down[0])
    with pytest.raises(ValueError, match="adapters for at least one expert, got none"):
        prepare_experts_lora(ExpertsLoRA(gate_up=[None, None]))
    stack = LORA.down[0]
    half = dataclasses.replace(stack, a=stack.a.half(), b=stack.b.half())
    with pytest.raises(TypeError, match=r"lora.down\[1\] has torch.float16, others have torch.flo"):
        prepare_experts_lora(ExpertsLoRA(down=[stack, half]))


def test_slices_that_no_expert_writes_are_left_out():
    part = LoRASlice(narrow(LORA.gate_up[0], 8), 4)
    other = LoRASlice(narrow(LORA.gate_up[0], 8), 20)
    prepared = prepare_experts_lora(ExpertsLoRA(gate_up=[[part], [other]]))
    assert [(each.start, each.stop) for each in prepared.gate_up.slices] == [(4, 12), (20, 28)]
