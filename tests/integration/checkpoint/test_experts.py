"""Experts are read as the checkpoint stores them; gate and up become one weight."""

import dataclasses

import pytest
import torch

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.experts import experts_weight, join_rows, stored_experts
from int4_lora.reference import dequantize
from support.handmade import quantization
from support.layouts import Model
from support.weights import random_weight

HIDDEN, INTER, COUNT = 64, 32, 3
OWNER = "model.layers.0.mlp.experts"
NAMES = {"gate_proj": (INTER, HIDDEN), "up_proj": (INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
OLDER = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def checkpoint(folder, *, parts=NAMES, owner=OWNER, leave=(), spoil=None, shards=1, **how):
    """Write and open experts; return the checkpoint and its dense weights."""
    model = Model()
    for expert in range(COUNT):
        for part, shape in parts.items():
            model.packed(f"{owner}.{expert}.{part}", *shape, **how)
    for name in leave:
        for part in ("packed", "scale", "shape"):
            del model.stored[f"{name}.weight_{part}"]
    if spoil is not None:
        spoil(model.stored)
    symmetric = {"symmetric": not how.get("zero_points", False)}
    return open_checkpoint(model.save(folder / "int4", quantization(**symmetric), shards=shards)), {
        name: tensor.double() for name, tensor in model.dense.items()
    }


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_gate_is_before_up(tmp_path, older, zero_points):
    parts = {name: NAMES[part] for name, part in OLDER.items()} if older else NAMES
    source, dense = checkpoint(tmp_path, parts=parts, zero_points=zero_points, shards=2)
    names = stored_experts(source.modules())[OWNER]
    gate, up, down = names.parts
    assert (names.count, names.parts) == (COUNT, ("w1", "w3", "w2") if older else (*NAMES,))
    experts = experts_weight(source, names)
    assert (experts.count, experts.hidden, experts.inter) == (COUNT, HIDDEN, INTER)
    for expert in range(COUNT):
        exact = dequantize(experts.gate_up[expert], torch.float64)
        of = f"{OWNER}.{expert}"
        both = [dense[f"{of}.{part}.weight"] for part in (gate, up)]
        assert torch.equal(exact, torch.cat(both))
        exact = dequantize(experts.down[expert], torch.float64)
        assert torch.equal(exact, dense[f"{of}.{down}.weight"])


@pytest.mark.parametrize("layout", ["channel", "group", "g_idx", "tensor", "block"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_take_apart_what_join_rows_made(layout, symmetric, bits):
    count = 25 if layout == "block" else 24  # whole blocks of 5 rows, whole words of zero-points
    how = {"rows": count, "columns": 32, "layout": layout, "symmetric": symmetric, "bits": bits}
    first, second = (random_weight(**how, seed=seed) for seed in (1, 2))
    if layout == "g_idx":
        second = dataclasses.replace(second, g_idx=first.g_idx)
    joined = join_rows(first, second)
    dense = torch.cat([dequantize(first), dequantize(second)])
    assert torch.equal(dequantize(joined), dense)
    if layout == "tensor":
        assert joined.strategy == "channel"  # two scales
        return
    for part, rows in ((first, slice(0, count)), (second, slice(count, 2 * count))):
        apart = joined.rows(rows)
        for name in ("packed", "scale", "zero_point", "g_idx"):
            held, expected = getattr(apart, name), getattr(part, name)
            assert (held is None) == (expected is None)
            assert held is None or torch.equal(held, expected), name


def test_zero_points_of_rows_that_fill_no_word():
    how = {"rows": 13, "columns": 32, "symmetric": False}
    first, second = (random_weight(**how, seed=seed) for seed in (1, 2))
    dense = torch.cat([dequantize(first), dequantize(second)])
    assert torch.equal(dequantize(join_rows(first, second)), dense)


def test_one_scale_of_both_stays_one_scale():
    weight = random_weight(rows=24, columns=32, layout="tensor", symmetric=False)
    joined = join_rows(weight, weight)
    assert joined.strategy == "tensor"
    assert torch.equal(dequantize(joined), torch.cat([dequantize(weight)] * 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 64}, "in_features of both weights must be equal, got 32, 64"),
        ({"bits": 8}, "bits of both weights must be equal, got 4, 8"),
        ({"symmetric": False}, "symmetric of both weights must be equal, got True, False"),
        ({"groups": 4}, "the same groups"),
        ({"dtype": torch.float16}, "scales of both weights must have one dtype"),
        ({"layout": "g_idx"}, "g_idx of both weights must be equal"),
    ],
)
def test_weights_that_cannot_be_joined(change, message):
    how = {"rows": 24, "columns": 32, "groups": 2, "dtype": torch.bfloat16}
    first, second = random_weight(**how), random_weight(**{**how, **change})
    with pytest.raises(ValueError, match=message):
        join_rows(first, second)


def test_rows_that_do_not_fill_their_blocks():
    weight = random_weight(rows=13, columns=32, layout="block")
    with pytest.raises(ValueError, match="must fill its blocks of 5 rows, got 13"):
        join_rows(weight, weight)


def test_a_missing_projection_is_named(tmp_path):
    source, _ = checkpoint(tmp_path, leave=[f"{OWNER}.1.up_proj"])
    with pytest.raises(ValueError, match=r"experts: expert 1 of 3 has no quantised up_proj"):
        stored_experts(source.modules())


def test_a_missing_expert_is_named(tmp_path):
    source, _ = checkpoint(tmp_path, leave=[f"{OWNER}.1.{part}" for part in NAMES])
    with pytest.raises(ValueError, match=r"experts: expert 1 of 3 has no quantised gate_proj"):
        stored_experts(source.modules())


def test_two_spellings_in_one_layer_are_refused():
    with pytest.raises(ValueError, match="must have gate_proj, up_proj, down_proj or w1, w3, w2"):
        stored_experts(["experts.0.gate_proj", "experts.0.w1", "experts.0.w3", "experts.0.w2"])


def test_experts_of_different_formats_are_refused(tmp_path):
    def in_float16(stored):
        name = f"{OWNER}.2.down_proj.weight_scale"
        stored[name] = stored[name].to(torch.float16)

    source, _ = checkpoint(tmp_path, spoil=in_float16)
    names = stored_experts(source.modules())[OWNER]
    message = r"experts: all experts must have one format: dtype of scale of down\[0\]"
    with pytest.raises(ValueError, match=message):
        experts_weight(source, names)


def test_gate_and_up_of_different_formats_are_refused(tmp_path):
    def in_float16(stored):
        name = f"{OWNER}.2.up_proj.weight_scale"
        stored[name] = stored[name].to(torch.float16)

    source, _ = checkpoint(tmp_path, spoil=in_float16)
    names = stored_experts(source.modules())[OWNER]
    with pytest.raises(ValueError, match=r"experts\.2: scales of both weights must have one dtype"):
        experts_weight(source, names)
