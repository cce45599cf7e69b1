"""Layouts of adapter_model.safetensors: names of other trainers, and tensors beside the pairs."""

import pytest
import torch

from support.conversion import convert, refusal
from support.layouts import (
    assert_tensors,
    lora_config,
    lora_tensors,
    pairs_of,
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
