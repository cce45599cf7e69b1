"""weight_shape in any integer dtype or not stored, and one scale of shape []: the same weights."""

import json

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import base
from safetensors.torch import load_file, save_file

from int4_lora.integration import annotate, open_checkpoint
from int4_lora.integration.checkpoint.compressed_tensors import upstream_scheme
from int4_lora.reference import dequantize
from support.conversion import convert, run, tensors_of
from support.handmade import Handmade, make_adapter, quantization, unpack_rows
from support.layouts import pack

NAME = "model.layers.0.self_attn.q_proj"
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16,
            torch.uint32, torch.uint64]  # fmt: skip
LAYOUTS = {
    "group": {"strategy": "group"},
    "asymmetric": {"strategy": "group", "symmetric": False},
    "tensor": {"strategy": "tensor"},
    "asymmetric tensor": {"strategy": "tensor", "symmetric": False},
}


def made(folder, layout, *, columns=64, **changes):
    """Write a checkpoint of one module; ``changes`` replaces its tensors, None removes one."""
    checkpoint = Handmade()
    checkpoint.plain("model.norm.weight", 64)
    checkpoint.quantise(NAME, 40, columns, **layout)
    for part, change in changes.items():
        tensor = checkpoint.stored.pop(f"{NAME}.{part}", None)
        if change is not None:
            checkpoint.stored[f"{NAME}.{part}"] = change(tensor)
    checkpoint.save(folder, {"quantization_config": quantization(**layout)})
    return checkpoint.dense[f"{NAME}.weight"]


def check_read(folder, dense):
    """Check that every command reads the one module as ``dense``."""
    opened = open_checkpoint(folder)
    assert opened.shape_of(NAME) == tuple(dense.shape)
    assert torch.equal(dequantize(opened.packed_weight(NAME)), dense)
    inspected = json.loads(run("inspect", folder, "--json").stdout)
    assert inspected["modules"][0]["shape"] == list(dense.shape)
    verified = run("verify", folder)
    assert verified.exit_code == 0, verified.output
    convert("unpack", folder, folder.parent / "dense")
    assert torch.equal(tensors_of(folder.parent / "dense")[f"{NAME}.weight"], dense)
    annotate(folder)
    described = json.loads((folder / "lora_metadata.json").read_text())["modules"][NAME]
    assert described["shape"] == list(dense.shape)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_shape_may_be_of_any_integer_dtype(tmp_path, dtype):
    dense = made(tmp_path / "x", LAYOUTS["group"], weight_shape=lambda shape: shape.to(dtype))
    check_read(tmp_path / "x", dense)


@pytest.mark.parametrize("layout", ["group", "asymmetric"])
def test_a_shape_that_follows_from_the_groups_need_not_be_stored(tmp_path, layout):
    dense = made(tmp_path / "x", LAYOUTS[layout], weight_shape=None)
    check_read(tmp_path / "x", dense)


def test_a_shape_that_follows_from_g_idx_need_not_be_stored(tmp_path):
    """The words of 35 columns could hold 33 to 40: g_idx says how many there are."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (40, 35), generator=generator)
    scale = torch.rand(40, 2, generator=generator)
    order = torch.randperm(35, generator=generator) % 2
    checkpoint = Handmade()
    checkpoint.stored = {
        f"{NAME}.weight_packed": pack(codes.numpy()),
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_g_idx": order.to(torch.int32),
    }
    config = quantization(actorder="group", group_size=18)
    checkpoint.save(tmp_path / "x", {"quantization_config": config})
    opened = open_checkpoint(tmp_path / "x")
    assert opened.shape_of(NAME) == (40, 35)
    assert torch.equal(dequantize(opened.packed_weight(NAME)), codes * scale[:, order])


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ({"strategy": "channel"}, {},
         r"in_features may be any of 57, 58, 59, 60, 61, 62, 63, 64 by the config"),
        ({"strategy": "tensor"}, {}, "in_features may be any of 57, 58"),
        ({"strategy": "group"}, {"weight_scale": lambda scale: scale[:, :1].clone()},
         r"no in_features up to 64 fits: for 64, group_size must be .* 64 / 1, got 32"),
        ({"strategy": "group"}, {"weight_packed": lambda words: words[0].clone()},
         r"weight_packed must be a matrix, got I32 \[8\]$"),
        ({"strategy": "group"}, {"weight_packed": lambda words: words.short()},
         "for 64, packed must be int32, got int16"),
        ({"strategy": "group"}, {"weight_packed": None},
         "weight_packed of a packed module is missing"),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_follow_is_asked_for(tmp_path, layout, changes, message):
    made(tmp_path / "x", layout, weight_shape=None, **changes)
    opened = open_checkpoint(tmp_path / "x")
    for read in (opened.shape_of, opened.packed_weight, opened.check):
        with pytest.raises(ValueError, match=f"model.safetensors: {NAME}: .*{message}"):
            read(NAME)
    for command in (["inspect"], ["verify"], ["annotate"], ["unpack", tmp_path / "dense"]):
        name, *more = command
        result = run(name, tmp_path / "x", *more)
        assert result.exit_code == 2
        assert not (tmp_path / "dense").exists()


SCALE = {"weight_scale": lambda one: one.reshape(())}
SCALAR = {
    "tensor": SCALE,
    "asymmetric tensor": {**SCALE, "weight_zero_point": lambda one: one.reshape(())},
}


@pytest.mark.parametrize("layout", SCALAR)
def test_one_scale_may_have_no_dimension(tmp_path, layout):
    """As upstream's own tests of the strategy tensor make it."""
    dense = made(tmp_path / "x", LAYOUTS[layout], **SCALAR[layout])
    check_read(tmp_path / "x", dense)
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    stored = {name.rpartition(".")[2]: one for name, one in tensors.items() if NAME in name}
    scheme = upstream_scheme(open_checkpoint(tmp_path / "x").schemes[NAME])
    theirs = base.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert torch.equal(theirs, dense)


@pytest.mark.parametrize("layout", SCALAR)
def test_a_merge_into_int4_keeps_the_shape_of_the_scale(tmp_path, layout):
    dense = made(tmp_path / "x", LAYOUTS[layout], **SCALAR[layout])
    deltas = make_adapter(tmp_path / "lora", {NAME: (40, 64)})
    options = [f"--adapter={tmp_path / 'lora'}", "--to=int4"]
    convert("merge", tmp_path / "x", tmp_path / "merged", *options)
    before, after = tensors_of(tmp_path / "x"), tensors_of(tmp_path / "merged")
    assert {name: (one.shape, one.dtype) for name, one in before.items()} == {
        name: (one.shape, one.dtype) for name, one in after.items()
    }
    scale = after[f"{NAME}.weight_scale"]
    zero = after.get(f"{NAME}.weight_zero_point", torch.zeros(()))
    codes = torch.from_numpy(unpack_rows(after[f"{NAME}.weight_packed"], 64))
    merged = ((codes - zero).to(scale.dtype) * scale).double()
    exact = dense.double() + deltas[NAME]
    assert (merged - exact).norm() < 0.2 * exact.norm()
    nearest = (exact / scale.double() + zero).clamp(-8, 7).round()
    assert torch.equal(codes.double(), nearest)


def test_no_dimension_is_one_scale_for_the_strategy_tensor_only(tmp_path):
    made(tmp_path / "x", LAYOUTS["group"], weight_scale=lambda scale: scale[0, 0].clone())
    with pytest.raises(ValueError, match=r"scale must be \[out_features, groups\] .* got \[\]"):
        open_checkpoint(tmp_path / "x").packed_weight(NAME)


def test_an_adapter_is_checked_against_the_shape_that_follows(tmp_path):
    made(tmp_path / "x", LAYOUTS["group"], weight_shape=None)
    make_adapter(tmp_path / "lora", {NAME: (40, 64)})
    make_adapter(tmp_path / "wide", {NAME: (40, 72)})
    assert run("inspect", tmp_path / "x", f"--adapter={tmp_path / 'lora'}").exit_code == 0
    wide = run("inspect", tmp_path / "x", f"--adapter={tmp_path / 'wide'}")
    assert wide.exit_code == 1
    assert "[40, 64]" in wide.output
    options = [f"--adapter={tmp_path / 'lora'}", "--to=int4"]
    convert("merge", tmp_path / "x", tmp_path / "merged", *options)
    assert f"{NAME}.weight_shape" not in tensors_of(tmp_path / "merged")
    convert("unpack", tmp_path / "merged", tmp_path / "dense")


def test_two_weights_of_one_module_are_refused(tmp_path):
    made(tmp_path / "x", LAYOUTS["group"], weight=lambda _: torch.zeros(40, 64))
    result = run("unpack", tmp_path / "x", tmp_path / "dense")
    assert result.exit_code == 2
    assert f"{NAME}: weight is stored beside weight_packed" in result.stderr
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    del tensors[f"{NAME}.weight"]
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    convert("unpack", tmp_path / "x", tmp_path / "dense")
