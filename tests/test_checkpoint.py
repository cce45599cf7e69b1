"""open_checkpoint: one file and sharded, and what is refused, with file and module named."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import open_checkpoint
from int4_lora.reference import dequantize
from support.weights import random_weight

Q_PROJ = "model.layers.0.self_attn.q_proj"


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config, config["quantization_config"])
    file.write_text(json.dumps(config))


def edit_tensors(folder, **changes):
    """Replace tensors of q_proj; None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for part, change in changes.items():
        name = f"{Q_PROJ}.{part}"
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors.get(name)).contiguous()
    save_file(tensors, file)


def shard(folder, parts=3):
    """Split model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        own = dict(sorted(tensors.items())[part::parts])
        save_file(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


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
    (ValueError, r"weight_shape must be int64 \[2\], got \[3\]",
     {"weight_shape": lambda t: torch.tensor([256, 256, 1])}),
    (ValueError, "shape must hold two positive", {"weight_shape": lambda t: -t}),
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


def weights(**changes):
    return lambda _, q: q["config_groups"]["group_0"]["weights"].update(changes)


BAD_CONFIGS = [
    ("quantization_config is missing", lambda c, q: c.pop("quantization_config")),
    ("quantization_config must be an object", lambda c, q: c.update(quantization_config=[])),
    ("quant_method must be 'compressed-tensors', got 'gptq'",
     lambda c, q: q.update(quant_method="gptq")),
    ("config_groups must be an object, got None", lambda c, q: q.pop("config_groups")),
    ("config_groups.group_0: Value error, strategy group requires group_size",
     weights(group_size=None)),
    ("config_groups.group_0: .*", weights(num_bits="four")),
    ("config_groups.group_0: weights must be an object, got 'W4A16'",
     lambda c, q: q["config_groups"]["group_0"].update(weights="W4A16")),
    ("config_groups.group_0 must be an object or a list", lambda c, q: q["config_groups"].update(
        group_0=3)),
    ("config_groups.group_0: targets: ",
     lambda c, q: q["config_groups"]["group_0"].update(targets=3)),
    ("config_groups.W9A9: no such preset",
     lambda c, q: q.update(config_groups={"W9A9": ["Linear"]})),
    ("quant_method must be .* got 'awq': convert it with AutoAWQConverter",
     lambda c, q: q.update(quant_method="awq")),
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
        (r"is pack-quantized \(int, 3 bits\), not pack-quantized of int", weights(num_bits=3)),
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
        q["config_groups"]["group_0"]["weights"].pop(field)
        for field in ("actorder", "block_structure", "scale_dtype", "observer", "zp_dtype")
    ],
    "fields of another version": weights(a_field_of_the_future=1, observer=["x"]),
    "actorder as a bool": weights(actorder=False),
    "actorder removed since": weights(actorder="group"),
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


def test_files_that_are_not_there_or_not_readable(copied_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder with a checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    model = copied_model / "model.safetensors"
    whole = model.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        model.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors"):
            open_checkpoint(copied_model)
    model.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(copied_model)
    (copied_model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        open_checkpoint(copied_model)
    (copied_model / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="the top level must be an object, got list"):
        open_checkpoint(copied_model)


def test_a_dense_checkpoint_is_refused(copied_model):
    save_file({"model.norm.weight": torch.ones(4)}, copied_model / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor named \*\.weight_packed"):
        open_checkpoint(copied_model)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_leaves_the_folder_is_refused(copied_model, name):
    index = shard(copied_model)
    shutil.copy(
        copied_model / "model-00001-of-00003.safetensors",
        copied_model.parent / "outside.safetensors",
    )
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a shard must be a file name in the folder"):
        open_checkpoint(copied_model)


def test_a_link_that_leaves_the_folder_is_refused(copied_model, tmp_path):
    model = copied_model / "model.safetensors"
    model.rename(tmp_path / "elsewhere.safetensors")
    model.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is a link that leaves the folder"):
        open_checkpoint(copied_model)
    model.unlink()
    (tmp_path / "elsewhere.safetensors").rename(model)
    index = shard(copied_model)
    part = copied_model / "model-00002-of-00003.safetensors"
    part.rename(tmp_path / "part.safetensors")
    part.symlink_to(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"00002-of-00003.* is a link that leaves"):
        open_checkpoint(copied_model)
    assert index.is_file()


def test_the_links_of_the_hubs_cache_may_be_followed(copied_model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in copied_model.iterdir():
        file.rename(blobs / file.stem)
        (snapshot / file.name).symlink_to(blobs / file.stem)
    assert len(open_checkpoint(snapshot).modules()) == 14


def test_an_index_that_lies_is_refused(copied_model):
    index = shard(copied_model)
    content = json.loads(index.read_text())
    first, second, *_ = sorted(set(content["weight_map"].values()))
    moved = next(name for name, file in content["weight_map"].items() if file == first)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: second}}))
    with pytest.raises(ValueError, match=f"{re.escape(moved)} is said to be in {second}"):
        open_checkpoint(copied_model)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: 3}}))
    with pytest.raises(ValueError, match="weight_map must map tensor names to file names"):
        open_checkpoint(copied_model)
    index.write_text(json.dumps(content))
    (copied_model / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {second}, which is not there"):
        open_checkpoint(copied_model)
