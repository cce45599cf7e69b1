"""ExpertsWeight and ExpertsLoRA: what they hold, and what they refuse."""

import dataclasses

import pytest
import torch

from int4_lora.reference import ExpertsLoRA, ExpertsWeight, LoRASlice
from support.experts import HIDDEN, INTER, random_experts, random_experts_lora
from support.weights import narrow, random_stack, random_weight

EXPERTS = random_experts()
LORA = random_experts_lora()


def gate_up_of(**arguments):
    return random_weight(**{"rows": 2 * INTER, "columns": HIDDEN, **arguments})


def test_widths_and_bytes():
    assert (EXPERTS.count, EXPERTS.hidden, EXPERTS.inter) == (4, HIDDEN, INTER)
    # 4 experts: words of 48 x 32 and 32 x 24 codes, 4 float32 scales for each row
    assert EXPERTS.nbytes == 4 * (48 * 4 * 4 + 32 * 3 * 4 + (48 + 32) * 4 * 4)


def test_lists_are_kept_as_tuples():
    gate_up = list(EXPERTS.gate_up)
    experts = ExpertsWeight(gate_up, list(EXPERTS.down))
    gate_up.clear()
    assert experts.count == 4


def test_to_moves_every_tensor():
    experts, lora = EXPERTS.to("meta"), LORA.to("meta")
    assert {weight.packed.device.type for weight in (*experts.gate_up, *experts.down)} == {"meta"}
    parts = [part for e in range(4) for n in ("gate_up", "down") for part in lora.slices(n, e)]
    assert {part.stack.a.device.type for part in parts} == {"meta"}
    assert len(parts) == 7  # two slices for expert 1, none for expert 2
    with pytest.raises(TypeError, match="device must be a torch"):
        EXPERTS.to(torch.float32)


def test_slices_of_an_expert():
    assert [part.start for part in LORA.slices("gate_up", 1)] == [INTER, 0]
    assert LORA.slices("gate_up", 2) == () == LORA.slices("down", 2)
    assert ExpertsLoRA(gate_up=LORA.gate_up).slices("down", 0) == ()
    assert (LORA.adapters, LORA.count) == (3, 4)
    assert (ExpertsLoRA().adapters, ExpertsLoRA().count) == (0, 0)


WRONG_WEIGHTS = [
    ("shape", {"columns": 24}, r"shape of gate_up\[0\] is \[48, 32\], of gate_up\[2\] \[48, 24\]"),
    (
        "dtype",
        {"dtype": torch.float16},
        r"dtype of scale of gate_up\[0\] is float32, of gate_up\[2\] float16",
    ),
    ("groups", {"groups": 2}, r"shape of scale of gate_up\[0\] is \[48, 4\], of .* \[48, 2\]"),
    ("bits", {"bits": 8}, r"bits of gate_up\[0\] is 4, of gate_up\[2\] 8"),
    ("zero", {"symmetric": False}, r"whether zero_point is given of gate_up\[0\] is False"),
    ("g_idx", {"layout": "g_idx"}, r"whether g_idx is given of gate_up\[0\] is False"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [w[1:] for w in WRONG_WEIGHTS], ids=[w[0] for w in WRONG_WEIGHTS]
)
def test_experts_of_different_formats_are_refused(arguments, message):
    gate_up = list(EXPERTS.gate_up)
    gate_up[2] = gate_up_of(**arguments)
    with pytest.raises(ValueError, match=message):
        ExpertsWeight(gate_up, EXPERTS.down)


def test_experts_on_different_devices_are_refused():
    gate_up = [*EXPERTS.gate_up[:3], EXPERTS.gate_up[3].to("meta")]
    with pytest.raises(ValueError, match=r"device of gate_up\[0\] is cpu, of gate_up\[3\] meta"):
        ExpertsWeight(gate_up, EXPERTS.down)
    with pytest.raises(ValueError, match="all operands must be on one device: gate_up is on cpu"):
        ExpertsWeight(EXPERTS.gate_up, [weight.to("meta") for weight in EXPERTS.down])


def test_a_missing_expert_is_refused():
    missing = [*EXPERTS.down[:1], None, *EXPERTS.down[2:]]
    with pytest.raises(TypeError, match=r"down\[1\] must be a PackedWeight, got NoneType"):
        ExpertsWeight(EXPERTS.gate_up, missing)
    with pytest.raises(ValueError, match="a weight for each expert, got 4 and 3"):
        ExpertsWeight(EXPERTS.gate_up, EXPERTS.down[:3])
    with pytest.raises(ValueError, match="gate_up must hold at least one expert, got none"):
        ExpertsWeight([], [])
    with pytest.raises(TypeError, match="gate_up must be a sequence of PackedWeight, got Packed"):
        ExpertsWeight(EXPERTS.gate_up[0], EXPERTS.down[0])


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got \[48, 32\] and \[32, 48\]"):
        ExpertsWeight([gate_up_of()], [random_weight(rows=HIDDEN, columns=48)])
    with pytest.raises(ValueError, match=r"got \[47, 32\] and \[32, 24\]"):
        ExpertsWeight([gate_up_of(rows=47)], EXPERTS.down[:1])


def test_adapters_that_do_not_belong_together_are_refused():
    stack, fewer = LORA.gate_up[0], random_stack(adapters=2, rows=2 * INTER, columns=HIDDEN)
    with pytest.raises(ValueError, match=r"gate_up\[0\] has 3, gate_up\[2\] has 2"):
        ExpertsLoRA(gate_up=[stack, None, fewer])
    with pytest.raises(ValueError, match=r"gate_up\[1\] has 3, down\[0\] has 2"):
        ExpertsLoRA(gate_up=[None, stack], down=[fewer, None])
    with pytest.raises(ValueError, match="for the same experts, got 4 and 3"):
        ExpertsLoRA(LORA.gate_up, LORA.down[:3])
    with pytest.raises(TypeError, match=r"down\[0\]: lora must be a LoRAStack or LoRASlices"):
        ExpertsLoRA(down=[stack.a])
    with pytest.raises(TypeError, match="gate_up must be a sequence with the adapters of each"):
        ExpertsLoRA(gate_up=stack)


def test_adapters_that_do_not_fit_the_experts_are_refused():
    with pytest.raises(ValueError, match=r"an entry for each of the 4 experts, got 3"):
        ExpertsLoRA(gate_up=LORA.gate_up[:3]).check_fits(EXPERTS)
    down = [None, None, None, LORA.gate_up[0]]
    with pytest.raises(ValueError, match=r"lora.down\[3\]: lora must have the in_features of w"):
        ExpertsLoRA(down=down).check_fits(EXPERTS)
    overlapping = [LoRASlice(narrow(LORA.gate_up[0], INTER), start) for start in (0, INTER - 1)]
    with pytest.raises(ValueError, match=r"lora.gate_up\[0\]: slices must not overlap"):
        ExpertsLoRA(gate_up=[overlapping, None, None, None]).check_fits(EXPERTS)
    LORA.check_fits(EXPERTS)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXPERTS.gate_up = ()
