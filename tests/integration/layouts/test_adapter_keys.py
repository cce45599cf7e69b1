"""Layouts of adapter_model.safetensors: names of other trainers, and tensors beside the pairs."""

import pytest
import torch

from support.conversion import convert, refusal
from support.layouts import (
    Model,
    assert_tensors,
    group,
    lora_config,
    lora_tensors,
    pairs_of,
    quantization,
    write_adapter,
    write_tensors,
)

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}
FIRST = "base_model.model.model.layers.0"


def write(folder, pairs, tensors, **fields):
    return write_adapter(folder, tensors, lora_config(pairs, **fields))


def test_an_adapter_of_mistral_finetune(llama, tmp_path):
    """vllm#6573, lorax#546: lora.safetensors with norms, and no adapter_config.json."""
    folder = tmp_path / "lora"
    folder.mkdir()
    pairs = pairs_of({"layers.0.attention.wq": (64, 64)})
    norm = {"layers.0.attention_norm.weight": torch.ones(64)}
    write_tensors(folder / "lora.safetensors", lora_tensors(pairs, "{}.lora_{}.weight") | norm)
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert "adapter_config.json is not there" in said


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.k_proj.weight",
        "self_attn.q_proj.base_layer.weight",
        "self_attn.rotary_emb.inv_freq",
    ],
)
def test_the_whole_model_beside_the_pairs(name, llama, tmp_path):
    """Chinese-LLaMA-Alpaca#711, peft#1025, #1932: a state dict of everything."""
    pairs = pairs_of(SHAPES)
    tensors = lora_tensors(pairs) | {f"{FIRST}.{name}": torch.ones(32, 64)}
    folder = write(tmp_path / "lora", pairs, tensors)
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert f"{FIRST}.{name}" in said


def test_experts_that_share_one_matrix(llama, tmp_path):
    """Megatron-Bridge#6076: A [1, rank, in] shared by all experts, B [experts, out, rank]."""
    pairs = pairs_of(SHAPES)
    name = f"{FIRST}.mlp.experts.gate_up_proj"
    tensors = lora_tensors(pairs) | {
        f"{name}.lora_A.weight": torch.ones(1, 4, 64),
        f"{name}.lora_B.weight": torch.ones(4, 192, 4),
    }
    targets = ["q_proj", "down_proj", "gate_up_proj"]
    folder = write(tmp_path / "lora", pairs, tensors, target_modules=targets)
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert "gate_up_proj" in said
    assert "[1, 4, 64]" in said


def test_a_prefix_before_pefts_own(llama, tmp_path):
    """Automodel#3630: thinker.base_model.model., where base_model.model.thinker. was meant."""
    model, source = llama
    pairs = pairs_of(SHAPES)
    tensors = lora_tensors(pairs, "thinker.base_model.model.{}.lora_{}.weight")
    folder = write(tmp_path / "lora", pairs, tensors)
    said = refusal("merge", source, tmp_path / "merged", "--adapter", folder)
    assert "thinker." in said
    assert "--rename" in said
    rename = "thinker.base_model.model.="
    convert("merge", source, tmp_path / "merged", "--adapter", folder, "--rename", rename)
    assert_tensors(tmp_path / "merged", model.merged(pairs))


def test_norms_of_an_extracted_adapter(llama, tmp_path):
    """mergekit#328: what is no linear layer is saved whole, here with modules_to_save (#496)."""
    model, source = llama
    pairs = pairs_of(SHAPES)
    norm = torch.full((64,), 2, dtype=torch.bfloat16)
    tensors = lora_tensors(pairs) | {"base_model.model.model.norm.weight": norm}
    folder = write(tmp_path / "lora", pairs, tensors, modules_to_save=["norm"])
    convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert_tensors(tmp_path / "merged", model.merged(pairs) | {"model.norm.weight": norm})


def test_fused_experts_the_wrong_way_round(tmp_path):
    """Automodel#3284: B of gate_up_proj as [hidden, r * E]; PEFT has [2 * inter, r * E]."""
    model = Model()
    for expert in range(2):
        for part, rows, columns in (("gate", 32, 80), ("up", 32, 80), ("down", 80, 32)):
            name = f"model.layers.0.mlp.experts.{expert}.{part}_proj"
            model.packed(name, rows, columns, size=16)

    source = model.save(tmp_path / "source", quantization({"group_0": group(group_size=16)}))
    name = f"{FIRST}.mlp.experts.base_layer"
    fields = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    wrong = {f"{name}.lora_A.weight": torch.ones(8, 64), f"{name}.lora_B.weight": torch.ones(80, 8)}
    folder = write(tmp_path / "wrong", {}, wrong, **fields)
    said = refusal("merge", source, tmp_path / "merged", "--adapter", folder)
    assert "gate_up_proj" in said
    assert "the adapter has 80 rows" in said
    assert "the base has gate_proj 32, up_proj 32" in said


def test_lower_case_names(llama, tmp_path):
    """torchtune#2537: layers.0.attn.q_proj.lora_a.weight, in torchtune's own names."""
    pairs = pairs_of({"layers.0.attn.q_proj": (64, 64)})
    tensors = {
        name.lower(): tensor for name, tensor in lora_tensors(pairs, "{}.lora_{}.weight").items()
    }
    folder = write(tmp_path / "lora", pairs, tensors)
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert "layers.0.attn.q_proj.lora_a.weight" in said
    assert "variant" not in said
