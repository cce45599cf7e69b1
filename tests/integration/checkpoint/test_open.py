"""open_checkpoint: one file and sharded, and what is refused, with file and module named."""

import re

import pytest
import torch

from int4_lora.integration import open_checkpoint
from int4_lora.reference import dequantize
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, shard, weights
from support.conversion import run
from support.handmade import make_adapter, quantization, small

pytestmark = pytest.mark.versions


def test_modules_and_config(tiny_models):
    checkpoint = open_checkpoint(tiny_models["asym-g32"])
    assert Q_PROJ in checkpoint.modules()
    assert "lm_head" not in checkpoint.modules()
    assert checkpoint.config["model_type"] == "llama"
    weight = checkpoint.packed_weight(Q_PROJ)
    assert (weight.shape, weight.group_size, weight.bits) == ((256, 256), 32, 4)
    assert checkpoint.tensor("model.norm.weight").dtype == torch.bfloat16


def test_a_sharded_checkpoint_is_the_same(tiny_models, copied_model):
    shard(copied_model)
    one, many = open_checkpoint(tiny_models["asym-g32"]), open_checkpoint(str(copied_model))
    assert sorted(many.modules()) == sorted(one.modules())
    for name in one.modules():
        ours, theirs = many.packed_weight(name), one.packed_weight(name)
        assert torch.equal(dequantize(ours), dequantize(theirs))


BAD_TENSORS = [
    (ValueError, "weight_scale of a quantised module is missing", {"weight_scale": None}),
    (ValueError, "weight_zero_point of an asymmetric module is missing",
     {"weight_zero_point": None}),
    (ValueError, r"zero_point must be .* dim 0 .* got \[256, 1\]",
     {"weight_zero_point": lambda t: torch.zeros(256, 1, dtype=torch.int32)}),
    (TypeError, "packed must be int32, got uint8", {"weight_packed": lambda t: t.byte()}),
    (ValueError, r"packed must be .* got \[256, 31\]", {"weight_packed": lambda t: t[:, 1:]}),
    (TypeError, "scale must be .* got float64", {"weight_scale": lambda t: t.double()}),
    (ValueError, r"group_size must be None for a scale of \[1\], got 32",
     {"weight_scale": lambda t: t[0, :1], "weight_zero_point": lambda t: t[0, :1].to(torch.int8)}),
    (ValueError, r"weight_shape must be two integers of shape \[2\], got F32 \[2\]",
     {"weight_shape": lambda t: t.float()}),
    (ValueError, r"weight_shape must be two integers of shape \[2\], got BOOL \[2\]",
     {"weight_shape": lambda t: t.bool()}),
    (ValueError, r"weight_shape must be two integers of shape \[2\], got I64 \[3\]",
     {"weight_shape": lambda t: torch.tensor([256, 256, 1])}),
    (ValueError, "weight_shape must be two positive lengths", {"weight_shape": lambda t: -t}),
    (ValueError, "packed must be .* 256 x 4611686018427387904",
     {"weight_shape": lambda t: torch.tensor([256, 2**62])}),
    (ValueError, "weight is stored beside weight_packed, and pack-quantized has none",
     {"weight": lambda _: torch.zeros(256, 256)}),
    (ValueError, "weight_global_scale is stored beside weight_packed",
     {"weight_global_scale": lambda _: torch.ones(1)}),
    (ValueError, "g_idx must be .* got 8",
     {"weight_g_idx": lambda t: torch.full((256,), 8, dtype=torch.int32)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changes"), BAD_TENSORS)
def test_refuses_tensors_that_contradict_each_other(copied_model, error, message, changes):
    edit_tensors(copied_model, **changes)
    checkpoint = open_checkpoint(copied_model)
    where = re.escape(f"{copied_model / 'model.safetensors'}: {Q_PROJ}: ")
    with pytest.raises(error, match=where + ".*" + message):
        checkpoint.packed_weight(Q_PROJ)
    assert dequantize(checkpoint.packed_weight(Q_PROJ.replace("q_", "k_"))).shape == (128, 256)


def test_another_strategy_than_the_config_says_is_refused(copied_model):
    edit_config(copied_model, weights(strategy="channel", group_size=None))
    message = "scale has the shape of strategy 'group', config.json says 'channel'"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(copied_model).packed_weight(Q_PROJ)


def test_a_zero_point_where_the_config_says_symmetric_is_refused(copied_model):
    edit_config(copied_model, weights(symmetric=True))
    with pytest.raises(ValueError, match="weight_zero_point is stored, but the config says"):
        open_checkpoint(copied_model).packed_weight(Q_PROJ)


def test_names_that_are_not_there(tiny_models):
    checkpoint = open_checkpoint(tiny_models["g128"])
    with pytest.raises(ValueError, match="no quantised module named 'lm_head'"):
        checkpoint.packed_weight("lm_head")
    with pytest.raises(ValueError, match="no tensor named 'nothing'"):
        checkpoint.tensor("nothing")


@pytest.mark.parametrize("form", ["pack-quantized", "dense", "int-quantized", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_saved_without_compression_are_called_so(tmp_path, form, dtype):
    """One reason everywhere, and what to do: llm-compressor saved with save_compressed=False."""
    made = small()
    for name in made.quantised:
        for part in ("weight_packed", "weight_shape"):
            del made.stored[f"{name}.{part}"]
        made.stored[f"{name}.weight"] = made.dense[f"{name}.weight"].to(dtype)
    config = {**quantization(), "format": form, "quantization_status": "frozen"}
    made.save(tmp_path / "x", {"quantization_config": config})
    make_adapter(tmp_path / "lora", {made.quantised[0]: (64, 64)})
    stored = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    for command in (
        ["inspect", tmp_path / "x"],
        ["verify", tmp_path / "x"],
        ["annotate", tmp_path / "x"],
        ["unpack", tmp_path / "x", tmp_path / "dense"],
        ["merge", tmp_path / "x", tmp_path / "dense", f"--adapter={tmp_path / 'lora'}"],
    ):
        result = run(*command)
        assert result.exit_code == 2
        assert f"the weight is stored as {stored} beside weight_scale: 4 of 4" in result.stderr
        assert "saved without compression (quantization_status 'frozen')" in result.stderr
        assert "save_pretrained(save_compressed=True)" in result.stderr
        assert "remove quantization_config from config.json" in result.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora", "x"]


def test_floats_alone_under_a_quantization_config_are_called_uncompressed(tmp_path):
    made = small()
    made.stored = made.dense
    folder = made.save(tmp_path / "x")
    result = run("inspect", folder)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "config.json has quantization_config, but the weights are stored as floats" in said
    assert "remove quantization_config from config.json" in said


def test_the_tensors_of_another_method_are_not_called_uncompressed(tmp_path):
    made = small()
    for name in made.quantised:
        made.stored[f"{name}.qweight"] = made.stored.pop(f"{name}.weight_packed")
        for part in ("weight_scale", "weight_shape"):
            del made.stored[f"{name}.{part}"]
    for method, said in (
        ("gptq", "checkpoint_format must be 'gptq' or 'gptq_v2', got 'pack-quantized'"),
        ("compressed-tensors", "no tensor named *.weight_packed: not a packed checkpoint"),
    ):
        config = {**quantization(), "quant_method": method}
        folder = made.save(tmp_path / method, {"quantization_config": config})
        result = run("inspect", folder)
        assert result.exit_code == 2
        assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("status", ["frozen", None])
def test_what_is_packed_is_read_whatever_the_status(tmp_path, status):
    config = {**quantization(), "quantization_status": status}
    folder = small().save(tmp_path / "x", {"quantization_config": config})
    assert run("verify", folder).exit_code == 0


def test_one_module_without_compression_is_enough(tmp_path):
    made = small()
    first = made.quantised[0]
    del made.stored[f"{first}.weight_packed"]
    made.stored[f"{first}.weight"] = made.dense[f"{first}.weight"]
    made.save(tmp_path / "x")
    with pytest.raises(ValueError, match=f"{first}: the weight is stored as BF16 .* 1 of 4"):
        open_checkpoint(tmp_path / "x")


def test_what_is_left_of_a_module_is_refused(tmp_path):
    """Without codes and scales, only weight_shape says that there was a module."""
    made = small()
    first = made.quantised[0]
    for part in ("weight_packed", "weight_scale"):
        del made.stored[f"{first}.{part}"]
    made.save(tmp_path / "x")
    for command in (["inspect"], ["verify"], ["annotate"], ["unpack", tmp_path / "dense"]):
        result = run(command[0], tmp_path / "x", *command[1:])
        assert result.exit_code == 2
        assert f"{first}: weight_packed of a packed module is missing" in " ".join(
            result.output.replace("│", "").split()
        )
    made.plain(f"{first}.weight", 64, 64)  # a dense module with a rest
    made.save(tmp_path / "y")
    assert first not in open_checkpoint(tmp_path / "y").modules()
    assert run("unpack", tmp_path / "y", tmp_path / "dense").exit_code == 0
