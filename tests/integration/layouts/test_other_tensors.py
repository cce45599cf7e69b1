"""Layouts with tensors beside the packed weights: draft heads, caches, biases, clip bounds."""

import pytest
import torch

from support.conversion import convert, refusal, run, tensors_of
from support.layouts import (
    LAYER,
    Model,
    adapter,
    assert_dense,
    assert_merged,
    assert_tensors,
    quantization,
)

Q_PROJ = "model.layers.0.self_attn.q_proj"
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def test_a_draft_head_in_bfloat16(tmp_path):
    """vllm#53387, #41994, sglang#35797: mtp.* is dense, its experts are one 3-D tensor."""
    model = Model().llama()
    draft = "mtp.layers.0.self_attn.q_proj"
    model.plain("mtp.fc.weight", 64, 128)
    model.plain(f"{draft}.weight", 64, 64)
    model.plain("mtp.layers.0.mlp.experts.gate_up_proj", 2, 64, 64)
    ignore = ["lm_head", "mtp.fc", draft]
    source = model.save(tmp_path / "source", quantization(ignore=ignore), shards=3)
    assert_dense(model, source, tmp_path / "dense")
    said = run("annotate", source, "--dry-run").stdout
    suggested = "suggested_lora_targets: down_proj, gate_proj, k_proj, o_proj, up_proj, v_proj\n"
    assert suggested in said  # q_proj would name the draft head too
    folder, pairs = adapter(tmp_path / "lora", {Q_PROJ: (64, 64), draft: (64, 64)})
    convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert_tensors(tmp_path / "merged", model.merged(pairs))


@pytest.mark.parametrize(
    "place", ["self_attn.{}_scale", "self_attn.{}_proj.output_scale"], ids=["new", "old"]
)
def test_scales_of_the_cache(place, tmp_path):
    """llm-compressor#967, sglang#35455; up to compressed-tensors#133 they were output_scale."""
    model = Model().llama()
    scales = {
        f"model.layers.{layer}.{place.format(part)}": torch.tensor([0.5 + layer]).bfloat16()
        for layer in range(2)
        for part in "kv"
    }
    model.stored |= scales
    source = model.save(tmp_path / "source", quantization(kv_cache_scheme=CACHE))
    assert_dense(model, source, tmp_path / "dense")
    folder, _ = adapter(tmp_path / "lora", {Q_PROJ: (64, 64)})
    options = ("--adapter", folder, "--to", "int4", "--max-error", "1")
    convert("merge", source, tmp_path / "int4", *options)
    merged = tensors_of(tmp_path / "int4")
    assert merged.keys() == model.stored.keys()
    assert all(torch.equal(merged[name], scale) for name, scale in scales.items())


def test_biases(tmp_path):
    """vllm#29315: packed layers of GPT-OSS, as of Qwen2, have biases."""
    model = Model().llama()
    for part in "qkv":
        name = f"self_attn.{part}_proj"
        model.plain(f"model.layers.0.{name}.bias", LAYER[name][0])
    source = model.save(tmp_path / "source", quantization())
    assert_dense(model, source, tmp_path / "dense")
    folder, pairs = adapter(tmp_path / "lora", {Q_PROJ: (64, 64)})
    assert_merged(model, pairs, source, folder, tmp_path / "merged")
    options = ("--adapter", folder, "--to", "int4", "--max-error", "1")
    convert("merge", source, tmp_path / "int4", *options)
    merged = tensors_of(tmp_path / "int4")
    assert merged.keys() == model.stored.keys()
    assert torch.equal(merged[f"{Q_PROJ}.bias"], model.dense[f"{Q_PROJ}.bias"])


def test_clip_bounds_and_linears_within_a_wrapper(tmp_path):
    """sglang#28018, #35792, vllm#41702: Gemma 4's vision layers are q_proj.linear with bounds."""
    model = Model().llama(prefix="model.language_model.")
    wrapper = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    model.plain(f"{wrapper}.linear.weight", 48, 48)
    for value, bound in enumerate(("input_min", "input_max", "output_min", "output_max")):
        model.put(f"{wrapper}.{bound}", torch.tensor(float(value), dtype=torch.bfloat16))
    config = quantization(ignore=["lm_head", f"{wrapper}.linear"])
    source = model.save(tmp_path / "source", config)
    assert_dense(model, source, tmp_path / "dense")
    text = "model.language_model.layers.0.self_attn.q_proj"
    shapes = {text: (64, 64), f"{wrapper}.linear": (48, 48)}
    regex = r".*(language_model.*\.q_proj|vision_tower.*\.q_proj\.linear)"
    folder, pairs = adapter(tmp_path / "lora", shapes, target_modules=regex)
    convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert_tensors(tmp_path / "merged", model.merged(pairs))


def test_an_adapter_on_an_aligner_and_a_vision_tower(tmp_path):
    """ms-swift#4974: InternVL's mlp1.1 and mlp1.3, whose names end in numbers, are dense."""
    model = Model().llama(prefix="language_model.model.", head="language_model.lm_head")
    shapes = {
        "mlp1.1": (64, 48),
        "mlp1.3": (64, 64),
        "vision_model.encoder.layers.0.attn.qkv": (144, 48),
    }
    for name, shape in shapes.items():
        model.plain(f"{name}.weight", *shape)
    ignore = ["language_model.lm_head", "re:mlp1.*", "re:vision_model.*"]
    source = model.save(tmp_path / "source", quantization(ignore=ignore))
    assert_dense(model, source, tmp_path / "dense")
    shapes["language_model.model.layers.0.self_attn.q_proj"] = (64, 64)
    folder, pairs = adapter(tmp_path / "lora", shapes)
    convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert_tensors(tmp_path / "merged", model.merged(pairs))


def with_experts_in_one_tensor(folder, weight):
    """Write a Llama with the experts ``weight``, packed into one tensor of three axes."""
    model = Model().llama()
    model.stored[f"{weight}_packed"] = torch.zeros(4, 64, 4, dtype=torch.int32)
    model.stored[f"{weight}_scale"] = torch.ones(4, 64, 1, dtype=torch.bfloat16)
    model.stored[f"{weight}_shape"] = torch.tensor([4, 64, 32])
    return model.save(folder, quantization())


def test_packed_experts_under_the_names_of_a_loader(tmp_path):
    """transformers#47407: gate_up_proj_packed, which a copy would pass off as a dense tensor."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    source = with_experts_in_one_tensor(tmp_path / "source", name)
    said = refusal("unpack", source, tmp_path / "dense")
    assert f"{name}_packed is I32 beside {name}_scale: quantised in a layout that is not" in said


def test_packed_experts_in_one_tensor(tmp_path):
    """llm-compressor#3183, #3200: repacked experts, w2_weight.weight_packed with three axes."""
    name = "model.layers.0.mlp.experts.w2_weight"
    source = with_experts_in_one_tensor(tmp_path / "source", f"{name}.weight")
    said = refusal("unpack", source, tmp_path / "dense")
    assert f"{name}: weight_packed must be a matrix, got I32 [4, 64, 4]" in said


def test_packed_words_under_the_old_name(tmp_path):
    """compressed-tensors#63: up to May 2024, the packed words were called weight."""
    model = Model().llama()
    model.stored = {
        name.replace("weight_packed", "weight"): tensor for name, tensor in model.stored.items()
    }
    source = model.save(tmp_path / "source", quantization())
    said = refusal("unpack", source, tmp_path / "dense")
    assert "weight_packed of a packed module is missing" in said
    assert "weight is I32: rename it to weight_packed" in said
