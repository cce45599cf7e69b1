"""A module of packed experts: what it computes, how it moves, what it saves and loads."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration.huggingface import Int4Experts
from int4_lora.integration.huggingface.data_parallel import packed_buffers
from int4_lora.reference import dequantize, int4_moe, moe_error_bound
from support.eager_graphs import without_inductor
from support.experts import random_experts, random_routing
from support.weights import random_x

HIDDEN, INTER, COUNT = 64, 32, 4
SIZES = {"hidden": HIDDEN, "inter": INTER, "groups": 2}
BF16 = torch.bfloat16
MOVES = {
    "to float64": lambda layer: layer.to(torch.float64),
    "half": lambda layer: layer.half(),
    "type": lambda layer: layer.type(torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}


@pytest.fixture(autouse=True)
def eager_graphs(monkeypatch):
    without_inductor(monkeypatch)


def made(**how):
    """Return packed experts and their weights."""
    weights = random_experts(COUNT, **{**SIZES, "dtype": BF16, **how})
    return Int4Experts(weights), weights


def equal(first, second):
    """Return whether two ExpertsWeight hold the same tensors."""
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for layer in ("gate_up", "down")
        for a, b in zip(getattr(first, layer), getattr(second, layer), strict=True)
        for name in ("packed", "scale", "zero_point", "g_idx")
        if getattr(b, name) is not None
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_forward_is_int4_moe(tokens, symmetric):
    layer, weights = made(symmetric=symmetric)
    ids, p = random_routing(tokens, 2, COUNT)
    x = random_x(tokens, HIDDEN, BF16) / 4
    y = layer(x, ids, p)
    exact = int4_moe(x.double(), weights, ids, p)
    bound = moe_error_bound(x, weights, ids, p, weight_rounded=False, steps_rounded=True)
    assert (y.dtype, y.shape) == (BF16, x.shape)
    assert ((y.double() - exact).abs() <= bound).all()


def test_routed_weights_may_be_wider_or_narrower_than_x():
    layer, _ = made()
    ids, p = random_routing(5, 2, COUNT)
    x, narrow = random_x(5, HIDDEN, torch.float64), p.to(BF16)
    assert torch.equal(layer(x, ids, narrow), layer(x, ids, narrow.double()))
    assert torch.equal(layer(x.float(), ids, narrow.double()), layer(x.float(), ids, narrow))


@pytest.mark.parametrize("layout", ["group", "channel", "g_idx", "tensor", "block"])
def test_the_weights_are_held_once(layout):
    how = {"layout": layout, "symmetric": layout in ("group", "tensor")}
    layer, weights = made(**how)
    assert not list(layer.parameters())
    assert equal(layer.experts_weight(), weights)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held <= 1.12 * weights.nbytes
    pointers = {buffer.untyped_storage().data_ptr() for buffer in layer.buffers()}
    views = [tensor for w in layer.prepared.gate_up for tensor in w.tensors]
    assert {tensor.untyped_storage().data_ptr() for tensor in views} <= pointers


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_moves_and_copies_keep_the_bits(move):
    layer, weights = made(symmetric=False)
    other = move(layer)
    assert equal(other.experts_weight(), weights)
    held = {buffer.untyped_storage().data_ptr() for buffer in other.buffers()}
    views = {one.untyped_storage().data_ptr() for w in other.prepared.down for one in w.tensors}
    assert views <= held  # not those of the original


def test_a_pickle_holds_each_tensor_once():
    layer, _ = made()
    layer(torch.zeros(1, HIDDEN), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    buffer = io.BytesIO()
    pickle.dump(layer, buffer)
    assert len(buffer.getvalue()) < 1.5 * sum(one.nbytes for one in layer.buffers()) + 20_000


def test_the_model_dtype_follows():
    layer, weights = made()
    dense = torch.stack([dequantize(weight) for weight in weights.gate_up])
    assert torch.equal(layer.gate_up_proj + 0, dense)
    layer.to(torch.float32)
    assert layer.gate_up_proj.dtype == torch.float32
    assert torch.equal(layer.gate_up_proj + 0, dense.float())
    assert layer.down_proj.shape == (COUNT, HIDDEN, INTER)


def test_dense_weights_are_read_only():
    layer, _ = made()
    for write in (
        lambda: layer.gate_up_proj.mul_(2),
        lambda: setattr(layer, "down_proj", torch.zeros(1)),
        lambda: setattr(layer, "down_proj", torch.nn.Parameter(torch.zeros(1))),
    ):
        with pytest.raises(RuntimeError, match="weight of an INT4 layer cannot be written to"):
            write()


@pytest.mark.parametrize("symmetric", [True, False])
def test_state_dict_has_each_projection_of_each_expert(tmp_path, symmetric):
    layer, weights = made(symmetric=symmetric)
    state = layer.state_dict()
    for expert in range(COUNT):
        gate, up = (weights.gate_up[expert].rows(slice(i * INTER, (i + 1) * INTER)) for i in (0, 1))
        for name, weight in (("gate", gate), ("up", up), ("down", weights.down[expert])):
            prefix = f"{expert}.{name}_proj.weight_"
            assert torch.equal(state[f"{prefix}packed"], weight.packed)
            assert torch.equal(state[f"{prefix}scale"], weight.scale)
            assert state[f"{prefix}shape"].tolist() == [*weight.shape]
            if not symmetric:
                assert torch.equal(state[f"{prefix}zero_point"], weight.zero_point)
    assert len(state) == COUNT * 3 * (3 if symmetric else 4)
    save_file(state, tmp_path / "file")
    other = Int4Experts(random_experts(COUNT, **SIZES, dtype=BF16, symmetric=symmetric))
    other.prepared  # noqa: B018
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(load_file(tmp_path / "file"))
    assert equal(other.experts_weight(), weights)


def test_loading_takes_all_tensors_or_none():
    layer, weights = made()
    state = layer.state_dict()
    scale = "2.up_proj.weight_scale"
    for change, message in (
        (lambda s: s.pop(scale), f"Missing key.*{scale}"),
        (lambda s: s.update({scale: s[scale].float()}), f"{scale}: must be torch.bfloat16"),
        (lambda s: s.update({"9.w1.weight": s[scale]}), "Unexpected key.*9.w1.weight"),
        (
            lambda s: s.update({"1.up_proj.weight_shape": torch.tensor([1, 2])}),
            r"1.up_proj.weight_shape must be \[32, 64\], got \[1, 2\]",
        ),
    ):
        changed = dict(state)
        change(changed)
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(changed)
        assert equal(layer.experts_weight(), weights)


def test_autocast_computes_in_its_dtype():
    layer, _ = made()
    ids, p = random_routing(3, 2, COUNT)
    x = random_x(3, HIDDEN, torch.float32)
    with torch.autocast("cpu", dtype=BF16):
        y = layer(x, ids, p)
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x.to(BF16), ids, p).float())


def test_torch_compile_has_one_break():
    layer, _ = made()
    ids, p = random_routing(3, 2, COUNT)
    x = random_x(3, HIDDEN, BF16)

    def block(x):
        return layer(x + 1, ids, p) * 2

    expected = block(x)
    assert torch.equal(torch.compile(block, backend="eager")(x), expected)
    assert torch._dynamo.explain(block)(x).graph_break_count == 1


def test_ddp_leaves_them_out():
    layer, _ = made()
    names = packed_buffers(torch.nn.Sequential(layer))
    assert {f"0.{name}" for name, _ in layer.named_buffers()} == set(names)


def test_experts_of_different_layouts_are_refused():
    weights = random_experts(COUNT, **SIZES, layout="g_idx", dtype=BF16)
    in_order = torch.full_like(weights.down[2].g_idx, -1)
    weights.down[2].g_idx.copy_(in_order)
    changed = type(weights)(weights.gate_up, [type(w)(w.packed, w.scale, w.shape, w.zero_point,
                            w.g_idx, w.group_size) for w in weights.down])  # fmt: skip
    with pytest.raises(ValueError, match="expert 2 of down has another than expert 0"):
        Int4Experts(changed)


def test_refuses_what_is_no_experts_weight():
    with pytest.raises(TypeError, match="must be an ExpertsWeight, got list"):
        Int4Experts([])
