"""Adapters of experts, in both of PEFT's forms, become the adapters of ``int4_moe``."""

import pytest
import torch

from int4_lora.integration import fit_adapter, open_checkpoint, read_adapter
from int4_lora.integration.adapter.expert_stacks import stack_expert_adapters
from int4_lora.integration.checkpoint.experts import stored_experts
from int4_lora.reference import LoRAStack
from support.handmade import quantization
from support.layouts import Model, lora_config, lora_tensors, pairs_of, write_adapter

HIDDEN, INTER, COUNT = 64, 32, 3
SHAPES = {"gate_proj": (INTER, HIDDEN), "up_proj": (INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
OWNER = "model.layers.0.mlp.experts"
SCALING = 2.0  # of lora_config


@pytest.fixture
def base(tmp_path):
    """Return the checkpoint of one layer's experts, and their names."""
    model = Model()
    for expert in range(COUNT):
        for part, shape in SHAPES.items():
            model.packed(f"{OWNER}.{expert}.{part}", *shape)
    source = open_checkpoint(model.save(tmp_path / "int4", quantization()))
    return source, stored_experts(source.modules())[OWNER]


def stacked(base, *folders):
    source, names = base
    adapters = [fit_adapter(read_adapter(folder), source) for folder in folders]
    return stack_expert_adapters(adapters, names, HIDDEN, INTER)


def per_expert(folder, names, seed=1, **fields):
    """Write an adapter with a pair for each of these projections; return folder and pairs."""
    shapes = {f"{OWNER}.{name}": SHAPES[name.partition(".")[2]] for name in names}
    pairs = pairs_of(shapes, seed=seed)
    return write_adapter(folder, lora_tensors(pairs), lora_config(pairs, **fields)), pairs


def for_all(folder, count=COUNT, **fields):
    """Write an adapter of ``target_parameters``; return folder and the delta of each weight."""
    shapes = {
        f"{expert}.{name}": shape
        for name, shape in (("gate_up_proj", (2 * INTER, HIDDEN)), ("down_proj", (HIDDEN, INTER)))
        for expert in range(count)
    }
    pairs = pairs_of(shapes)
    tensors = {}
    levels = {"gate_up_proj": f"{OWNER}.base_layer", "down_proj": OWNER}
    for name, level in levels.items():
        of = [pairs[f"{expert}.{name}"] for expert in range(count)]
        a = torch.cat([a for a, _ in of])  # rows by (expert, rank)
        b = torch.stack([b for _, b in of], dim=2).flatten(1)  # columns by (rank, expert)
        tensors |= lora_tensors({level: (a, b)})
    parameters = [f"mlp.experts.{name}" for name in levels]
    config = lora_config(pairs, target_parameters=parameters, peft_version="0.21.2", **fields)
    return write_adapter(folder, tensors, {**config, "target_modules": []}), {
        name: SCALING * (b @ a) for name, (a, b) in pairs.items()
    }


def delta(lora, part, expert, adapter):
    """Return what an adapter adds to a weight of an expert: ``[out, in]``."""
    rows, columns = (2 * INTER, HIDDEN) if part == "gate_up" else (HIDDEN, INTER)
    total = torch.zeros(rows, columns)
    for piece in lora.slices(part, expert):
        stack = piece.stack
        added = stack.scaling[adapter].float() * (stack.b[adapter] @ stack.a[adapter])
        total[piece.start : piece.stop] += added
    return total


def test_a_pair_for_all_experts(base, tmp_path):
    folder, deltas = for_all(tmp_path / "adapter")
    lora = stacked(base, folder)
    assert all(isinstance(entry, LoRAStack) for entry in lora.gate_up)  # gate and up share A
    for expert in range(COUNT):
        for part in ("gate_up", "down"):
            expected = deltas[f"{expert}.{part}_proj"]
            torch.testing.assert_close(delta(lora, part, expert, 0), expected, rtol=0, atol=0)


def test_a_pair_for_each_projection(base, tmp_path):
    every = [f"{expert}.{name}" for expert in range(COUNT) for name in SHAPES]
    folder, pairs = per_expert(tmp_path / "adapter", every)
    lora = stacked(base, folder)
    for expert in range(COUNT):
        added = {
            name: SCALING * (b @ a)
            for name in SHAPES
            for a, b in [pairs[f"{OWNER}.{expert}.{name}"]]
        }
        expected = torch.cat([added["gate_proj"], added["up_proj"]])
        torch.testing.assert_close(delta(lora, "gate_up", expert, 0), expected, rtol=0, atol=0)
        found = delta(lora, "down", expert, 0)
        torch.testing.assert_close(found, added["down_proj"], rtol=0, atol=0)


def test_both_forms_side_by_side(base, tmp_path):
    first, deltas = for_all(tmp_path / "first")
    second, pairs = per_expert(tmp_path / "second", ["1.up_proj"], seed=3)
    lora = stacked(base, first, second)
    assert lora.adapters == 2
    for expert in range(COUNT):
        expected = deltas[f"{expert}.gate_up_proj"]
        torch.testing.assert_close(delta(lora, "gate_up", expert, 0), expected, rtol=0, atol=0)
        expected = torch.zeros(2 * INTER, HIDDEN)
        if expert == 1:
            a, b = pairs[f"{OWNER}.1.up_proj"]
            expected[INTER:] = SCALING * (b @ a)
        torch.testing.assert_close(delta(lora, "gate_up", expert, 1), expected, rtol=0, atol=0)
        assert not delta(lora, "down", expert, 1).any()


def test_experts_without_a_pair_have_none(base, tmp_path):
    folder, _ = per_expert(tmp_path / "adapter", ["0.down_proj", "2.down_proj"])
    lora = stacked(base, folder)
    assert lora.gate_up is None
    assert [entry is None for entry in lora.down] == [False, True, False]


def test_an_adapter_of_other_layers(base, tmp_path):
    folder, _ = per_expert(tmp_path / "adapter", ["0.down_proj"])
    adapter = read_adapter(folder)
    others = stored_experts([f"layers.9.experts.0.{part}" for part in SHAPES])
    assert stack_expert_adapters([adapter], others["layers.9.experts"], HIDDEN, INTER) is None


def test_an_expert_that_the_base_lacks_is_named(base, tmp_path):
    folder, _ = per_expert(tmp_path / "adapter", ["3.down_proj"])
    with pytest.raises(ValueError, match=r"a pair for expert 3, the base has 3 experts"):
        stack_expert_adapters([read_adapter(folder)], base[1], HIDDEN, INTER)


def test_a_parameter_with_pairs_for_some_experts_is_refused(base, tmp_path):
    folder, _ = for_all(tmp_path / "adapter", count=2)
    with pytest.raises(ValueError, match="pairs for 2 of the 3 experts"):
        stacked(base, folder)


def test_another_shape_is_named(base, tmp_path):
    folder, _ = per_expert(tmp_path / "adapter", ["0.down_proj"])
    with pytest.raises(ValueError, match=r"the adapter is for a weight of \[64, 32\]"):
        stack_expert_adapters([read_adapter(folder)], base[1], HIDDEN, 48)
