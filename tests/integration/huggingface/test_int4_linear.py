import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.compressed_tensors import decompress
from int4_lora.integration.huggingface import Int4Linear
from int4_lora.reference import PackedWeight
from support.upstream_versions import IGNORES_G_IDX

NAME = "model.layers.0.self_attn.v_proj"  # [128, 256]
FORMS = ("g128", "asym-g32", "actorder-g128", "asym-channel", "w8-g128")
CASTS = {
    "half": lambda layer: layer.half(),
    "double": lambda layer: layer.double(),
    "to": lambda layer: layer.to(torch.bfloat16),
    "type": lambda layer: layer.type(torch.float64),
    "to a device": lambda layer: layer.to("cpu", torch.float32),
    "shared": lambda layer: layer.share_memory(),
    "copied": copy.deepcopy,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
}


def layer_of(folder, bias=None, **settings):
    return Int4Linear(open_checkpoint(folder).packed_weight(NAME), bias, **settings)


def stored(folder):
    """Return the tensors of the module as the file has them."""
    tensors = load_file(folder / "model.safetensors")
    prefix = f"{NAME}."
    return {name.removeprefix(prefix): one for name, one in tensors.items() if prefix in name}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("variant", FORMS)
def test_state_dict_is_the_checkpoints_bit_for_bit(tiny_models, variant):
    assert_same(layer_of(tiny_models[variant]).state_dict(), stored(tiny_models[variant]))


@pytest.mark.parametrize("variant", FORMS)
def test_nothing_casts_the_weight(tiny_models, variant):
    for name, cast in CASTS.items():
        layer = cast(layer_of(tiny_models[variant], torch.zeros(128)))
        state = layer.state_dict()
        dtype = state.pop("bias").dtype
        assert_same(state, stored(tiny_models[variant]))
        assert layer.prepared.signature == layer_of(tiny_models[variant]).prepared.signature
        if name in ("half", "double", "to", "type"):  # what a dense layer would have become
            assert layer.weight.dtype == dtype != torch.float32


@pytest.mark.parametrize("variant", FORMS)
def test_load_state_dict_takes_the_checkpoints_tensors(tiny_models, variant):
    own = layer_of(tiny_models[variant])
    zero = own.packed_weight()
    zero = PackedWeight(
        torch.zeros_like(zero.packed),
        torch.ones_like(zero.scale),
        zero.shape,
        None if zero.zero_point is None else torch.zeros_like(zero.zero_point),
        None if zero.g_idx is None else torch.arange(256, dtype=torch.int32) // 128,
        zero.group_size,
        zero.bits,
    )
    layer = Int4Linear(zero)
    layer.load_state_dict(stored(tiny_models[variant]))
    assert_same(layer.state_dict(), stored(tiny_models[variant]))
    assert torch.equal(layer.weight + 0, own.weight + 0)


WRONG = {
    "missing": (lambda state: state.pop("weight_scale"), "Missing key.*weight_scale"),
    "surplus": (
        lambda state: state.update(weight_zero_point=torch.zeros(16, 2, dtype=torch.int32)),
        "Unexpected key.*weight_zero_point",
    ),
    "cast": (
        lambda state: state.update(weight_scale=state["weight_scale"].half()),
        r"weight_scale: must be torch.bfloat16 \[128, 2\], got torch.float16 \[128, 2\]",
    ),
    "cropped": (
        lambda state: state.update(weight_packed=state["weight_packed"][:, :16]),
        r"weight_packed: must be torch.int32 \[128, 32\], got torch.int32 \[128, 16\]",
    ),
    "of another shape": (
        lambda state: state.update(weight_shape=torch.tensor([256, 128])),
        r"weight_shape must be \[128, 256\], got \[256, 128\]",
    ),
    "group out of range": (
        lambda state: state["weight_g_idx"].fill_(9),
        r"g_idx must be in \[-1, 2\)",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_state_dict_changes_nothing(tiny_models, fault):
    spoil, message = WRONG[fault]
    variant = "actorder-g128" if "group" in fault else "g128"
    layer, state = layer_of(tiny_models[variant]), stored(tiny_models[variant])
    spoil(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    if fault != "surplus":
        assert_same(layer.state_dict(), stored(tiny_models[variant]))


@pytest.mark.parametrize("variant", FORMS)
def test_one_hot_inputs_give_the_columns_that_compressed_tensors_decompresses(tiny_models, variant):
    checkpoint = open_checkpoint(tiny_models[variant])
    layer = layer_of(tiny_models[variant])
    if variant == "actorder-g128" and IGNORES_G_IDX:
        pytest.skip("compressed-tensors ignores weight_g_idx since 0.19")
    dense = decompress(checkpoint, NAME)
    x = torch.eye(256, dtype=dense.dtype, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, dense.T)
    y.backward(torch.eye(256, 128, dtype=dense.dtype))  # of y[i] for its output i: row i
    assert torch.equal(x.grad[:128], dense)
    assert torch.equal(layer.weight + 0, dense)
    assert torch.equal(layer.double().weight + 0, dense.double())


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 4), (0,), (2, 0)])
def test_leading_dimensions(tiny_models, leading):
    bias = torch.arange(128.0)
    layer = layer_of(tiny_models["g128"], bias)
    y = layer(torch.zeros(*leading, 256))
    assert y.shape == (*leading, 128)
    assert torch.equal(y, bias.expand(*leading, 128))


@pytest.mark.parametrize("shape", [(2, 128), (128,), (2, 2, 128)])
def test_another_width_is_refused(tiny_models, shape):
    with pytest.raises(ValueError, match=r"x must be \[tokens, in_features\]"):
        layer_of(tiny_models["g128"])(torch.zeros(shape))


def test_autocast_gives_what_a_dense_linear_gives(tiny_models):
    layer, dense = layer_of(tiny_models["g128"]), torch.nn.Linear(256, 128)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.zeros(2, 256, dtype=dtype)
            assert layer(x).dtype == dense(x).dtype
        assert layer(torch.zeros(2, 256, dtype=torch.float64)).dtype == torch.float64


def test_nothing_is_trainable_but_the_bias(tiny_models):
    layer = layer_of(tiny_models["asym-g32"], torch.zeros(128))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    layer(torch.zeros(3, 256)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((128,), 3.0))


def test_tensors_are_held_once(tiny_models):
    weight = open_checkpoint(tiny_models["asym-g32"]).packed_weight(NAME)
    layer = Int4Linear(weight)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == layer.prepared.nbytes
    assert layer.prepared.nbytes <= 1.12 * weight.nbytes


def test_no_dense_weight_is_made_unless_it_is_read(tiny_models, monkeypatch):
    from int4_lora.integration.huggingface import dequantised

    monkeypatch.setattr(dequantised, "dense_weight", None)
    layer = layer_of(tiny_models["g128"], torch.zeros(128))
    layer(torch.zeros(2, 256, requires_grad=True)).sum().backward()
    assert layer.weight.shape == (128, 256)
    assert copy.deepcopy(layer).half().weight.dtype == torch.float16
    layer.load_state_dict(layer.state_dict())


def test_the_weight_cannot_be_replaced(tiny_models):
    layer = layer_of(tiny_models["g128"])
    for value in (torch.zeros(128, 256), torch.nn.Parameter(torch.zeros(128, 256)), None):
        with pytest.raises(RuntimeError, match="cannot be written to"):
            layer.weight = value
    with pytest.raises(RuntimeError, match="cannot be written to"):
        layer.weight.data += 1
    with pytest.raises(RuntimeError, match="cannot be written to"):
        layer.reset_parameters()


def test_buffers_that_others_replace_are_used(tiny_models):
    """In accelerate, set_module_tensor_to_device replaces a module's buffers one by one."""
    layer = layer_of(tiny_models["g128"])
    x = torch.eye(256, dtype=torch.bfloat16)
    before = layer(x)
    for name, buffer in list(layer.named_buffers()):
        layer._buffers[name] = buffer.clone()
        if buffer.is_floating_point():
            layer._buffers[name] *= 2
    assert torch.equal(layer(x), 2 * before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
def test_within_torch_compile(tiny_models):
    layer = layer_of(tiny_models["asym-g32"], torch.zeros(128))
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_arguments_are_checked(tiny_models):
    with pytest.raises(TypeError, match="must be a PackedWeight or Float4Weight, got Tensor"):
        Int4Linear(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"bias must be \[128\], got \[256\]"):
        layer_of(tiny_models["g128"], torch.zeros(256))


def test_a_scalar_scale_and_another_integer_keep_their_stored_form():
    weight = PackedWeight(torch.zeros(2, 1, dtype=torch.int32), torch.ones(1), shape=(2, 8))
    state = Int4Linear(weight, shape_dtype=torch.int32, scalars=True).state_dict()
    assert state["weight_scale"].shape == ()
    assert state["weight_shape"].dtype == torch.int32
    layer = Int4Linear(weight, shape_dtype=None)
    assert sorted(layer.state_dict()) == ["weight_packed", "weight_scale"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False).state_dict(), layer.state_dict())
