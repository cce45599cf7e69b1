"""Layouts whose ``quantization_config`` is unusual: names, targets and several formats."""

import json

import pytest
import torch

from support.conversion import convert, refusal, run, tensors_of
from support.layouts import (
    LAYER,
    Model,
    adapter,
    assert_dense,
    assert_tensors,
    group,
    quantization,
    write_json,
)

MLP = "model.layers.0.mlp.up_proj"
FP8 = {"num_bits": 8, "type": "float", "dynamic": True, "symmetric": True}


def test_a_config_group_may_have_the_name_of_a_preset(tmp_path):
    """TensorRT-LLM#15415: the keys of config_groups are schemes, not group_0."""
    model = Model().llama()
    source = model.save(tmp_path / "source", quantization({"W4A16": group()}))
    assert_dense(model, source, tmp_path / "dense")


def test_targets_may_list_every_layer(tmp_path):
    """vllm#12617: a recipe that names its layers one by one; what it leaves out stays dense."""
    model = Model().llama()
    model.plain("model.layers.2.mlp.up_proj.weight", 96, 64)
    names = [name.removesuffix(".weight_packed") for name in model.stored if "packed" in name]
    source = model.save(tmp_path / "source", quantization({"group_0": group(names)}, ignore=[]))
    assert_dense(model, source, tmp_path / "dense")


def test_the_old_key_with_a_sparsity_config(tmp_path):
    """llm-compressor#680, compressed-tensors#169: compression_config with a dense sparsity."""
    model = Model().llama()
    source = model.save(tmp_path / "source", quantization())
    config = json.loads((source / "config.json").read_text())
    old = config.pop("quantization_config")
    old["sparsity_config"] = {"format": "dense", "global_sparsity": 0.14, "ignore": []}
    write_json(source / "config.json", {**config, "compression_config": old})
    assert_dense(model, source, tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == config


@pytest.fixture
def mixed(tmp_path):
    """Return a model with INT4 beside blocks of FP8, and its folder."""
    model = Model().llama()
    random = torch.Generator().manual_seed(3)
    for layer in range(2):
        for part, (rows, columns) in LAYER.items():
            if "self_attn" not in part:
                continue
            name = f"model.layers.{layer}.{part}"
            for end in ("packed", "scale", "shape"):
                del model.stored[f"{name}.weight_{end}"]
            codes = torch.randint(-8, 8, (rows, columns), generator=random).float()
            scale = torch.randint(1, 64, (rows // 32, columns // 32), generator=random) / 64
            model.stored[f"{name}.weight"] = codes.to(torch.float8_e4m3fn)
            model.stored[f"{name}.weight_scale"] = scale.to(torch.bfloat16)
            spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            model.dense[f"{name}.weight"] = (codes * spread).to(torch.bfloat16)
    blocks = {**FP8, "dynamic": False, "strategy": "block", "block_structure": [32, 32]}
    fp8 = {
        **group(["re:.*self_attn.*"], **blocks, group_size=None),
        "format": "float-quantized",
        "input_activations": {**FP8, "strategy": "group", "group_size": 32},
    }
    int4 = {**group(["re:.*mlp.*"]), "format": "pack-quantized"}
    config = quantization({"group_0": fp8, "group_1": int4}, format="mixed-precision")
    return model, model.save(tmp_path / "source", config)


def test_int4_beside_fp8_blocks(mixed, tmp_path):
    """sglang#37207, #16282: each config group has a format of its own."""
    model, source = mixed
    assert_dense(model, source, tmp_path / "dense")
    folder, pairs = adapter(tmp_path / "mlp", {MLP: LAYER["mlp.up_proj"]})
    convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert_tensors(tmp_path / "merged", model.merged(pairs))
    annotated = run("annotate", source, "--dry-run")
    assert "suggested_lora_targets: down_proj, gate_proj, up_proj\n" in annotated.stdout


def test_an_adapter_on_the_fp8_part_is_refused(mixed, tmp_path):
    folder, _ = adapter(tmp_path / "q", {"model.layers.0.self_attn.q_proj": (64, 64)})
    said = refusal("merge", mixed[1], tmp_path / "merged", "--adapter", folder)
    assert "model.layers.0.self_attn.q_proj: it is float-quantized of float, 8 bits" in said


def test_layers_of_three_bits_beside_four(tmp_path):
    """vllm#49893, auto-round#2174: W4 and W3 by layer; ten 3-bit codes fill a word."""
    model = Model().llama(layers=1)
    name = "model.layers.1.mlp.up_proj"
    model.stored[f"{name}.weight_packed"] = torch.zeros(96, 7, dtype=torch.int32)
    model.stored[f"{name}.weight_scale"] = torch.ones(96, 2, dtype=torch.bfloat16)
    model.stored[f"{name}.weight_shape"] = torch.tensor([96, 64])
    groups = {
        "four": group([r"re:.*layers\.0\..*"]),
        "three": group([r"re:.*layers\.1\..*"], num_bits=3),
    }
    source = model.save(tmp_path / "source", quantization(groups))
    said = refusal("unpack", source, tmp_path / "dense")
    assert f"{name}: pack-quantized of int, 3 bits, cannot be unpacked" in said
    folder, _ = adapter(tmp_path / "three", {name: (96, 64)})
    said = refusal("merge", source, tmp_path / "merged", "--adapter", folder)
    assert f"{name}: it is pack-quantized of int, 3 bits" in said
    folder, _ = adapter(tmp_path / "four", {MLP: (96, 64)})
    options = ("--adapter", folder, "--to", "int4", "--max-error", "1")
    convert("merge", source, tmp_path / "int4", *options)
    merged = tensors_of(tmp_path / "int4")
    assert merged.keys() == model.stored.keys()
    assert torch.equal(merged[f"{name}.weight_packed"], model.stored[f"{name}.weight_packed"])


def test_int4_with_fp8_activations(tmp_path):
    """sglang#38573: W4A8, whose weights have groups of 64, not of 128."""
    model = Model()
    model.plain("model.embed_tokens.weight", 48, 64)
    model.packed("model.layers.0.self_attn.q_proj", 64, 64, size=64)
    w4a8 = {**group(group_size=64), "input_activations": {**FP8, "strategy": "token"}}
    source = model.save(tmp_path / "source", quantization({"group_0": w4a8}))
    assert_dense(model, source, tmp_path / "dense")
    folder, pairs = adapter(tmp_path / "lora", {"model.layers.0.self_attn.q_proj": (64, 64)})
    convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert_tensors(tmp_path / "merged", model.merged(pairs))
    said = run("annotate", source, "--dry-run").stdout
    assert "lora_compatible: false" in said
    assert "pack-quantized of int, 4 bits, with quantised activations" in said


def test_marlin_24_is_named(tmp_path):
    """sglang#31555: INT4 whose format is not pack-quantized."""
    source = Model().llama().save(tmp_path / "source", quantization(format="marlin-24"))
    said = refusal("unpack", source, tmp_path / "dense")
    assert "marlin-24 of int, 4 bits, cannot be unpacked" in said
    said = run("annotate", source, "--dry-run").stdout
    assert "model.layers.0.mlp.down_proj is marlin-24 of int, 4 bits" in said


def test_a_packed_module_on_the_ignore_list(tmp_path):
    """compressed-tensors#712: saving packs what the recipe ignored; engines expect it dense."""
    model = Model().llama()
    model.packed("mtp.layers.0.mlp.up_proj", 96, 64)
    ignore = ["lm_head", "re:.*mtp.*"]
    source = model.save(tmp_path / "source", quantization(ignore=ignore))
    assert_dense(model, source, tmp_path / "dense")
    said = run("annotate", source, "--dry-run").stdout
    assert "lora_compatible: false" in said
    assert "mtp.layers.0.mlp.up_proj is packed, but on the ignore list" in said
    narrow = quantization({"group_0": group([r"re:^model\.layers\..*"])}, ignore=ignore)
    source = model.save(tmp_path / "narrow", narrow)
    said = refusal("unpack", source, tmp_path / "other")
    assert "mtp.layers.0.mlp.up_proj is quantised, but no config group targets it" in said


def test_an_activation_order_that_is_the_column_order(tmp_path):
    """compressed-tensors#143, vllm#8135: a weight_g_idx without activation order in the config."""
    model = Model().llama()
    for name in [name for name in model.stored if name.endswith("weight_shape")]:
        columns = int(model.stored[name][1])
        g_idx = torch.arange(columns, dtype=torch.int32) // 32
        model.stored[name.replace("weight_shape", "weight_g_idx")] = g_idx
    source = model.save(tmp_path / "source", quantization())
    assert_dense(model, source, tmp_path / "dense")
    said = run("annotate", source, "--dry-run").stdout
    assert "stores a weight_g_idx, which vLLM does not load" in said
    assert "activation order than" not in said
