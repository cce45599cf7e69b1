"""The layout of Kimi K2.5: INT4 experts in groups of 32, the rest in bfloat16, names of a VLM."""

import json
import shutil

import numpy as np
import pytest
import torch

from support.conversion import convert, run, tensors_of
from support.layouts import Model, adapter, assert_dense, assert_tensors, pack, quantization

BODY = "language_model.model."
EXPERT = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
ATTENTION = {
    "q_a_proj": (32, 64),
    "q_b_proj": (96, 32),
    "kv_a_proj_with_mqa": (40, 64),
    "kv_b_proj": (128, 32),
    "o_proj": (64, 64),
}
IGNORE = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    "re:.*mlp\\.(gate|up|down)_proj.*",
]
EXPERTS = {
    f"{BODY}layers.1.mlp.experts.{expert}.{name}": shape
    for expert in range(4)
    for name, shape in EXPERT.items()
}
DENSE = {
    **{f"{BODY}layers.{layer}.self_attn.{name}": ATTENTION[name]
       for layer in range(2) for name in ("q_b_proj", "o_proj")},
    "language_model.lm_head": (48, 64),
}  # fmt: skip


def make(shape_dtype):
    """Return a model: a dense layer, a layer of experts, a vision tower and its projector."""
    model = Model()
    model.plain(f"{BODY}embed_tokens.weight", 48, 64)
    for layer in range(2):
        for name, shape in ATTENTION.items():
            model.plain(f"{BODY}layers.{layer}.self_attn.{name}.weight", *shape)
        mlp = f"{BODY}layers.{layer}.mlp"
        for name, shape in EXPERT.items():
            inner = "" if layer == 0 else "shared_experts."
            model.plain(f"{mlp}.{inner}{name}.weight", *shape)
    model.plain(f"{BODY}layers.1.mlp.gate.weight", 4, 64)
    model.put(f"{BODY}layers.1.mlp.gate.e_score_correction_bias", torch.rand(4))
    for name, shape in EXPERTS.items():
        model.packed(name, *shape)
        model.stored[f"{name}.weight_shape"] = torch.tensor(shape, dtype=shape_dtype)
    model.plain(f"{BODY}norm.weight", 64)
    model.plain("language_model.lm_head.weight", 48, 64)
    model.plain("mm_projector.proj.0.weight", 64, 48)
    model.plain("vision_tower.patch_embed.proj.weight", 48, 3, 2, 2)
    model.plain("vision_tower.encoder.blocks.0.wqkv.weight", 144, 48)
    return model


def config():
    """Return the config, which describes the quantisation in two places."""
    inner = quantization(ignore=IGNORE)
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": {"model_type": "deepseek_v3", "quantization_config": inner},
        "vision_config": {"model_type": ""},
    }


@pytest.fixture(scope="module", params=[torch.int32, torch.int64], ids=["int32", "int64"])
def kimi(request, tmp_path_factory):
    """Return the model, and its folder."""
    model = make(request.param)
    folder = tmp_path_factory.mktemp("kimi") / "base"
    return model, model.save(folder, quantization(ignore=IGNORE), config(), shards=3)


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Return the folder and the pairs of an adapter on dense layers, and of one on experts."""
    root = tmp_path_factory.mktemp("loras")
    return adapter(root / "dense", DENSE), adapter(root / "experts", EXPERTS)


def test_inspect_verify_and_unpack(kimi, tmp_path):
    model, source = kimi
    found = json.loads(run("inspect", source, "--json").stdout)
    assert {one["name"]: tuple(one["shape"]) for one in found["modules"]} == EXPERTS
    assert (found["unlisted"], found["lora_targets"]) == ([], sorted(EXPERT))
    assert_dense(model, source, tmp_path / "dense")
    left = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert left == {**config(), "text_config": {"model_type": "deepseek_v3"}}


def test_merge_into_dense(kimi, loras, tmp_path):
    model, source = kimi
    for folder, pairs in loras:
        convert("merge", source, tmp_path / folder.name, "--adapter", folder)
        assert_tensors(tmp_path / folder.name, model.merged(pairs))


def test_merge_into_int4(kimi, loras, tmp_path):
    """Codes and scales are those of the min-max rule, computed here; the rest is copied."""
    model, source = kimi
    options = [f"--adapter={folder}" for folder, _ in loras]
    before = (source / "config.json").read_bytes()
    convert("merge", source, tmp_path / "minmax", *options, "--to=int4", "--scales=minmax")
    assert (tmp_path / "minmax" / "config.json").read_bytes() == before
    (_, dense_pairs), (_, expert_pairs) = loras
    expected = dict(model.stored)
    merged = model.merged(dense_pairs)
    expected |= {f"{name}.weight": merged[f"{name}.weight"] for name in DENSE}
    for name, (a, b) in expert_pairs.items():
        exact = model.dense[f"{name}.weight"].double() + 2 * (b.double() @ a.double())
        groups = exact.reshape(len(exact), -1, 32)
        scale = (groups.abs().amax(2) / 7.5).to(torch.bfloat16)
        codes = (groups / scale.double()[:, :, None]).round().clamp(-8, 7).flatten(1)
        expected[f"{name}.weight_scale"] = scale
        expected[f"{name}.weight_packed"] = pack(codes.numpy().astype(np.int64))
    assert_tensors(tmp_path / "minmax", expected)


def test_a_search_for_scales_loses_less(kimi, loras, tmp_path):
    model, source = kimi
    folder, pairs = loras[1]
    outcome = convert("merge", source, tmp_path / "searched", f"--adapter={folder}", "--to=int4")
    total = outcome["report"]["total"]
    assert total["relative_error"] < total["relative_error_minmax"] < 0.15
    found = tensors_of(tmp_path / "searched")
    for name, (a, b) in pairs.items():
        exact = model.dense[f"{name}.weight"].double() + 2 * (b.double() @ a.double())
        groups = exact.reshape(len(exact), -1, 32)
        scale = found[f"{name}.weight_scale"].double()[:, :, None]
        codes = (groups / scale).round().clamp(-8, 7).flatten(1)  # the nearest, for any scale
        packed = pack(codes.numpy().astype(np.int64))
        assert torch.equal(found[f"{name}.weight_packed"], packed), name
    untouched = {name for name in model.stored if name.rpartition(".")[0] not in EXPERTS}
    assert all(torch.equal(found[name], model.stored[name]) for name in untouched)


def test_adapters_are_checked_and_annotated(kimi, loras, tmp_path):
    _, source = kimi
    (dense, _), (experts, _) = loras
    assert run("inspect", source, f"--adapter={experts}").exit_code == 0
    said = run("inspect", source, f"--adapter={dense}")
    assert said.exit_code == 1
    assert "is not packed in INT4" in " ".join(said.output.split())
    copied = shutil.copytree(source, tmp_path / "copied")
    result = run("annotate", copied)
    assert result.exit_code == 0
    assert "lora_compatible: false" in result.output
    assert "only experts or the vocabulary are packed" in result.output
    described = json.loads((copied / "lora_metadata.json").read_text())["modules"]
    assert {name: tuple(one["shape"]) for name, one in described.items()} == EXPERTS
