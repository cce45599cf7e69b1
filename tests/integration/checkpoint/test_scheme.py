"""quantization_config of every version: what it may say, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.match import match_targets

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.scheme import read_schemes
from int4_lora.reference import dequantize
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, weights
from support.weights import random_weight

pytestmark = pytest.mark.versions

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


def test_exact_name_beats_pattern_beats_class(copied_model):
    def change(_, quantization):
        first = quantization["config_groups"]["group_0"]
        others = {"pattern": (["re:.*q_proj"], 64), "exact": ([Q_PROJ], 16)}
        for name, (targets, size) in others.items():
            weights = {**first["weights"], "group_size": size}
            quantization["config_groups"][name] = {**first, "targets": targets, "weights": weights}

    edit_config(copied_model, change)
    schemes = open_checkpoint(copied_model).schemes
    assert schemes[Q_PROJ].group_size == 16
    assert schemes[Q_PROJ.replace("0", "1")].group_size == 64
    assert schemes[Q_PROJ.replace("q_proj", "v_proj")].group_size == 32


def schemes_of(groups, names):
    """Return the group size by which each module was matched; every group has its own."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            str(size): {"targets": [target], "weights": {**GROUP, "group_size": size}}
            for target, size in groups.items()
        },
    }
    found = read_schemes(Path("config.json"), {"quantization_config": quantization}, names)
    return [scheme.group_size for scheme in found.values()]


@pytest.mark.parametrize("side", ["input", "output"])
def test_activations_of_either_side_count(side):
    group = {"targets": ["Linear"], "weights": {**GROUP, "group_size": 8}}
    group |= {"input_activations": None, "output_activations": None}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    for activations in (None, {"num_bits": 8, "strategy": "token", "dynamic": True}):
        quantization["config_groups"] = {"x": {**group, f"{side}_activations": activations}}
        found = read_schemes(Path("config.json"), {"quantization_config": quantization}, ["q_proj"])
        assert found["q_proj"].activations == (activations is not None)


def test_targets_are_tried_in_upstreams_order():
    q_proj, embed = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
    assert schemes_of({"re:.*q_proj": 4, "re:.*attn.*": 8}, [q_proj]) == [8]
    assert schemes_of({"re:.*attn.*": 8, "re:.*q_proj": 4}, [q_proj]) == [8]
    assert schemes_of({"Linear": 4, "Embedding": 8}, [q_proj, embed, "lm_head"]) == [4, 8, 4]
    assert schemes_of({"Embedding": 8}, [embed]) == [8]
    assert schemes_of({"q_proj": 8, "Linear": 4}, [q_proj]) == [4]  # an exact name is whole
    theirs = match_targets(q_proj, torch.nn.Linear(1, 1), ["re:.*q_proj", "re:.*attn.*", "Linear"])
    assert theirs[0] == "re:.*attn.*"


BAD_CONFIGS = [
    ("group_0: format must be one of compressed-tensors', got 'banana'",
     lambda c, q: [q.update(format="banana"), q["config_groups"]["group_0"].pop("format")]),
    ("group_0: format must be one of compressed-tensors', got None",
     lambda c, q: [q.pop("format"), q["config_groups"]["group_0"].pop("format")]),
    (r"transform_config rotates .* got config_groups \['R1'\]",
     lambda c, q: q.update(transform_config={"config_groups": {"R1": {}}})),
    ("quantization_config is missing", lambda c, q: c.pop("quantization_config")),
    ("quantization_config must be an object", lambda c, q: c.update(quantization_config=[])),
    ("quant_method must be 'compressed-tensors', 'awq' or 'gptq', got 'fp8'",
     lambda c, q: q.update(quant_method="fp8")),
    ("config_groups must be an object, got None", lambda c, q: q.pop("config_groups")),
    ("config_groups.group_0: weights: strategy group requires a positive group_size, got None",
     weights(group_size=None)),
    ("config_groups.group_0: weights.num_bits must be .*, got 'four'", weights(num_bits="four")),
    ("config_groups.group_0: weights must be an object, got 'W4A16'",
     lambda c, q: q["config_groups"]["group_0"].update(weights="W4A16")),
    ("config_groups.group_0: a config group must be an object or a list",
     lambda c, q: q["config_groups"].update(group_0=3)),
    ("config_groups.group_0: targets must be a list of names, got 3",
     lambda c, q: q["config_groups"]["group_0"].update(targets=3)),
    ("config_groups.W9A9: no such preset",
     lambda c, q: q.update(config_groups={"W9A9": ["Linear"]})),
    ("quant_method must be .* got 'bitsandbytes': its codes are packed for its own kernels",
     lambda c, q: q.update(quant_method="bitsandbytes")),
    ("quant_method must be .* got None", lambda c, q: q.pop("quant_method")),
    (r"config_groups.group_0: target 're:\(': missing \)",
     lambda c, q: q["config_groups"]["group_0"].update(targets=["re:("])),
    ("no config group targets it",
     lambda c, q: q["config_groups"]["group_0"].update(targets=["Conv"])),
]  # fmt: skip


@pytest.mark.parametrize(("message", "change"), BAD_CONFIGS)
def test_refuses_configs(copied_model, message, change):
    edit_config(copied_model, change)
    with pytest.raises(
        ValueError, match=re.escape(str(copied_model / "config.json")) + ".*" + message
    ):
        open_checkpoint(copied_model)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"is pack-quantized \(int, 3 bits\), not pack-quantized or int-quantized of int",
         weights(num_bits=3)),
        (r"is pack-quantized \(float, 4 bits\), not", weights(type="float")),
        (r"is float-quantized \(int, 4 bits\), not pack-quantized",
         lambda c, q: q["config_groups"]["group_0"].update(format="float-quantized")),
    ],
)  # fmt: skip
def test_other_formats_are_listed_and_refused_by_name(copied_model, message, change):
    edit_config(copied_model, change)
    checkpoint = open_checkpoint(copied_model)
    assert len(checkpoint.modules()) == 14
    assert not checkpoint.is_packed(Q_PROJ)
    with pytest.raises(ValueError, match=f"{Q_PROJ}: {message}"):
        checkpoint.packed_weight(Q_PROJ)


def rename(quantization, config):
    config["compression_config"] = config.pop("quantization_config")
    config["compression_config"].pop("quant_method")


OTHER_SPELLINGS = {
    "old key": lambda c, q: rename(q, c),
    "in text_config": lambda c, q: (
        c.update(text_config={"quantization_config": q}) or c.pop("quantization_config")
    ),
    "strategy left out": weights(strategy=None),
    "fields left out": lambda c, q: [
        q["config_groups"]["group_0"]["weights"].pop(field, None)
        for field in ("actorder", "block_structure", "scale_dtype", "observer", "zp_dtype")
    ],
    "fields of another version": weights(a_field_of_the_future=1, observer=["x"]),
    "actorder as a bool": weights(actorder=False),
    "actorder by its alias": weights(actorder="static"),
    "preset": lambda c, q: q.update(config_groups={"W4A16_ASYM": ["Linear"]}),
    "format per group": lambda c, q: q.update(format="mixed-precision"),
    "a group for activations only": lambda c, q: q["config_groups"].update(
        kv={"targets": ["re:.*"], "weights": None}
    ),
}


@pytest.mark.parametrize("spelling", OTHER_SPELLINGS)
def test_configs_of_other_versions_say_the_same(tiny_models, tmp_path, spelling):
    model = "asym-g128" if spelling == "preset" else "asym-g32"
    copied = shutil.copytree(tiny_models[model], tmp_path / "copied")
    edit_config(copied, OTHER_SPELLINGS[spelling])
    ours, theirs = open_checkpoint(copied), open_checkpoint(tiny_models[model])
    for name in theirs.modules():
        dense = dequantize(theirs.packed_weight(name))
        assert torch.equal(dequantize(ours.packed_weight(name)), dense)


@pytest.mark.parametrize("spelling", ["7x8", [7, 8]])
def test_blocks_are_spelled_in_two_ways(tmp_path, tiny_models, spelling):
    blocks = random_weight("block", rows=21, columns=48, block=(7, 8), dtype=torch.bfloat16)
    copied = shutil.copytree(tiny_models["g128"], tmp_path / "copied")
    edit_config(copied, weights(strategy="block", group_size=None, block_structure=spelling))
    edit_tensors(
        copied,
        weight_packed=lambda _: blocks.packed,
        weight_scale=lambda _: blocks.scale,
        weight_shape=lambda _: torch.tensor([21, 48]),
    )
    weight = open_checkpoint(copied).packed_weight(Q_PROJ)
    assert weight.group_size == (7, 8)
    assert torch.equal(dequantize(weight), dequantize(blocks))
