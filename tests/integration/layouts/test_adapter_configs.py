"""Layouts of adapter_config.json, from the oldest PEFT to versions to come."""

import pytest

from support.conversion import convert, refusal
from support.layouts import (
    adapter,
    assert_merged,
    assert_tensors,
    lora_config,
    lora_tensors,
    pairs_of,
    write_adapter,
)

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}
FIRST, SECOND = (f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))
NEW = {  # fields that some versions of PEFT do not know, with what they hold when unused
    "arrow_config": None,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "unsloth.models"},
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.30.0",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}
OLD = {"enable_lora": None, "merge_weights": False}


@pytest.mark.parametrize("fields", [NEW, OLD], ids=["new", "old"])
def test_fields_that_are_not_used(fields, llama, tmp_path):
    """peft#2275, ms-swift#3141, textgen#6819: newer fields; lmdeploy#1151: those of PEFT 0.2."""
    model, source = llama
    folder, pairs = adapter(tmp_path / "lora", SHAPES, **fields)
    assert_merged(model, pairs, source, folder, tmp_path / "merged")


def test_a_config_of_four_fields(llama, tmp_path):
    """torchtune#2159, #2162: torchtune writes r, lora_alpha, target_modules and peft_type."""
    model, source = llama
    pairs = pairs_of(SHAPES)
    config = lora_config(pairs)
    config = {key: config[key] for key in ("r", "lora_alpha", "target_modules", "peft_type")}
    folder = write_adapter(tmp_path / "lora", lora_tensors(pairs), config)
    assert_merged(model, pairs, source, folder, tmp_path / "merged")


@pytest.mark.parametrize(
    "pattern",
    [r".*\.layers\.0\..*(q_proj|k_proj)$", "model.layers.0.self_attn.q_proj"],
    ids=["axolotl", "mergekit"],
)
def test_patterns_of_ranks_and_alphas(pattern, llama, tmp_path):
    """axolotl#3673: regular expressions that end in $; mergekit#328: one layer's full name."""
    model, source = llama
    pairs = {**pairs_of({FIRST: (64, 64)}, rank=8), **pairs_of({SECOND: (64, 64)}, seed=5)}
    config = lora_config(pairs, rank_pattern={pattern: 8}, alpha_pattern={pattern: 32})
    folder = write_adapter(tmp_path / "lora", lora_tensors(pairs), config)
    convert("merge", source, tmp_path / "merged", "--adapter", folder)
    expected = model.merged({SECOND: pairs[SECOND]})
    expected[f"{FIRST}.weight"] = model.merged({FIRST: pairs[FIRST]}, 32 / 8)[f"{FIRST}.weight"]
    assert_tensors(tmp_path / "merged", expected)


def test_targets_that_no_layer_has(llama, tmp_path):
    """vllm#5909: PEFT trains the targets that exist, and keeps the others in the config."""
    model, source = llama
    targets = ["q_proj", "down_proj", "to_q"]
    folder, pairs = adapter(tmp_path / "lora", SHAPES, target_modules=targets)
    assert_merged(model, pairs, source, folder, tmp_path / "merged")


def test_a_mixture_of_adapters(llama, tmp_path):
    """peft#2132: XLORA is a method of its own."""
    folder, _ = adapter(tmp_path / "lora", SHAPES, peft_type="XLORA")
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert "peft_type must be 'LORA', got 'XLORA'" in said
