"""PreparedLoRA: what it holds, and how one adapter is replaced in place."""

import pytest
import torch

from int4_lora.compiled import PreparedLoRA, prepare_lora
from int4_lora.reference import LoRASlice, LoRAStack
from support.weights import narrow, random_stack

pytestmark = pytest.mark.versions

STACK = random_stack()
SLICES = [LoRASlice(narrow(STACK, 5), 0), LoRASlice(narrow(STACK, 8, 5), 5)]


def test_b_is_transposed_and_everything_is_a_copy():
    lora = prepare_lora(STACK)
    (only,) = lora.slices
    assert isinstance(lora, PreparedLoRA)
    assert torch.equal(only.bt, STACK.b.transpose(1, 2))
    assert torch.equal(only.a, STACK.a)
    assert only.bt.is_contiguous()
    assert lora.adapters == STACK.adapters
    assert lora.nbytes == sum(t.nbytes for t in (STACK.a, STACK.b, STACK.scaling))
    only.a.zero_()
    assert STACK.a.any()
    back = prepare_lora(SLICES).slices[1].lora_slice()
    assert (back.start, back.stop) == (SLICES[1].start, SLICES[1].stop)
    assert torch.equal(back.stack.b, SLICES[1].stack.b)


def test_adapters_in_int4_are_dequantised():
    packed = STACK.quantized()
    (prepared,), dense = prepare_lora(packed).slices, packed.dequantize()
    assert torch.equal(prepared.a, dense.a)
    assert torch.equal(prepared.bt, dense.b.transpose(1, 2))
    assert torch.equal(prepared.scaling, STACK.scaling)
    assert not torch.equal(prepared.a, STACK.a)


def test_an_adapter_is_replaced_in_place():
    lora = prepare_lora(SLICES)
    first, second = lora.slices
    places = [tensor.data_ptr() for tensor in (first.a, first.bt, second.a)]
    others = first.a[[0, 2]].clone()
    a, b = torch.ones(1, first.a.shape[2]), torch.full((5, 1), 2.0)
    lora.update(1, [(a, b, 0.25), None])
    assert [tensor.data_ptr() for tensor in (first.a, first.bt, second.a)] == places
    assert torch.equal(first.a[1, 0], a[0])
    assert not first.a[1, 1:].any()
    assert torch.equal(first.bt[1, 0], b[:, 0])
    assert first.scaling[1] == 0.25
    assert not second.a[1].any()
    assert not second.bt[1].any()
    assert torch.equal(first.a[[0, 2]], others)


def test_an_adapter_that_is_not_finite_is_noticed():
    lora = prepare_lora(STACK)
    assert lora.slices[0].finite
    b = torch.full((STACK.out_features, 1), torch.nan)
    lora.update(0, [(torch.ones(1, STACK.in_features), b, 1.0)])
    assert not lora.slices[0].finite
    lora.update(0, [(torch.ones(1, STACK.in_features), torch.ones(STACK.out_features, 1), 1.0)])
    assert lora.slices[0].finite
    spoiled = LoRAStack(STACK.a, STACK.b.index_fill(0, torch.tensor([1]), torch.inf), STACK.scaling)
    assert not prepare_lora(spoiled).slices[0].finite


def test_each_adapter_that_is_not_finite_counts():
    b = STACK.b.clone()
    b[0, 0, 0], b[2, 1, 0] = torch.nan, torch.inf
    lora = prepare_lora(LoRAStack(STACK.a, b, STACK.scaling))
    for adapter, finite in ((1, False), (0, False), (2, True)):
        lora.update(adapter, [GOOD])
        assert lora.slices[0].finite == finite


GOOD = (torch.ones(1, STACK.in_features), torch.ones(STACK.out_features, 1), 1.0)


@pytest.mark.parametrize(
    ("error", "message", "adapter", "given"),
    [
        (ValueError, r"adapter must be in \[0, 3\), got 3", 3, [GOOD]),
        (ValueError, r"adapter must be in \[0, 3\), got -1", -1, [GOOD]),
        (ValueError, "one entry per slice is needed, 1, got 2", 0, [GOOD, GOOD]),
        (TypeError, "a of slice 0 must be torch.float32", 0, [(GOOD[0].half(), *GOOD[1:])]),
        (TypeError, "b of slice 0 must be torch.float32", 0, [(GOOD[0], GOOD[1].half(), 1.0)]),
        (ValueError, "a of slice 0 must be", 0, [(torch.ones(99, STACK.in_features), *GOOD[1:])]),
        (ValueError, "a of slice 0 must be", 0, [(torch.ones(1, 3), *GOOD[1:])]),
        (ValueError, "b of slice 0 must be", 0, [(GOOD[0], torch.ones(3, 1), 1.0)]),
    ],
)
def test_a_wrong_update_changes_nothing(error, message, adapter, given):
    lora = prepare_lora(STACK)
    with pytest.raises(error, match=message):
        lora.update(adapter, given)
    assert torch.equal(lora.slices[0].a, STACK.a)


def test_refuses():
    with pytest.raises(ValueError, match="got none"):
        prepare_lora([])
    with pytest.raises(TypeError, match="lora must be a LoRAStack or LoRASlices, got Tensor"):
        prepare_lora(torch.ones(2))


def test_a_b_that_is_not_finite_is_known_before_it_can_be_read(monkeypatch):
    lora = prepare_lora(STACK)
    (one,) = lora.slices
    seen, zero = [], torch.Tensor.zero_
    monkeypatch.setattr(
        torch.Tensor, "zero_", lambda tensor: seen.append(one.finite) or zero(tensor)
    )
    rank, columns = STACK.a.shape[1:]
    spoilt = torch.full((STACK.out_features, rank), torch.nan)
    lora.update(0, [(torch.ones(rank, columns), spoilt, 1.0)])
    assert seen
    assert not any(seen)
    lora.update(0, [None])
    assert one.finite


@pytest.mark.parametrize("scaling", [None, "x", torch.ones(2)])
def test_a_scaling_that_is_no_number_changes_nothing(scaling):
    lora = prepare_lora(STACK)
    with pytest.raises(TypeError, match="scaling of slice 0 must be a float, got"):
        lora.update(0, [(STACK.a[0], STACK.b[0], scaling)])
    assert torch.equal(lora.slices[0].a, STACK.a)
