"""open_checkpoint: one file and sharded, and what is refused, with file and module named."""

import re

import pytest
import torch

from int4_lora.integration import open_checkpoint
from int4_lora.reference import dequantize
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, shard, weights

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
    (ValueError, "weight_shape of a packed module is missing", {"weight_shape": None}),
    (ValueError, "weight_zero_point of an asymmetric module is missing",
     {"weight_zero_point": None}),
    (ValueError, r"zero_point must be .* dim 0 .* got \[256, 1\]",
     {"weight_zero_point": lambda t: torch.zeros(256, 1, dtype=torch.int32)}),
    (TypeError, "packed must be int32, got uint8", {"weight_packed": lambda t: t.byte()}),
    (ValueError, r"packed must be .* got \[256, 31\]", {"weight_packed": lambda t: t[:, 1:]}),
    (TypeError, "scale must be .* got float64", {"weight_scale": lambda t: t.double()}),
    (ValueError, r"group_size must be None for a scale of \[1\], got 32",
     {"weight_scale": lambda t: t[0, :1], "weight_zero_point": lambda t: t[0, :1].to(torch.int8)}),
    (ValueError, r"weight_shape must be I64 \[2\], got I32 \[2\]",
     {"weight_shape": lambda t: t.int()}),
    (ValueError, r"weight_shape must be I64 \[2\], got I64 \[3\]",
     {"weight_shape": lambda t: torch.tensor([256, 256, 1])}),
    (ValueError, "weight_shape must be two positive lengths", {"weight_shape": lambda t: -t}),
    (ValueError, "packed must be .* 256 x 4611686018427387904",
     {"weight_shape": lambda t: torch.tensor([256, 2**62])}),
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
