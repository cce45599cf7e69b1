"""Layouts of adapter_config.json, from the oldest PEFT to versions to come."""

import json

import pytest

from support.conversion import convert, refusal, run
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


@pytest.mark.parametrize(
    "fields", [{"some_future_config": {"order": 2}}, {"enable_lora": [True, False, True]}]
)
def test_fields_that_are_used_and_not_known(fields, llama, tmp_path):
    """LlamaFactory#5348: enable_lora of PEFT 0.2 trains parts of a fused layer."""
    folder, _ = adapter(tmp_path / "lora", SHAPES, **fields)
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert next(iter(fields)) in said


def test_an_alpha_of_zero(llama, tmp_path):
    """verl#1821: a merged FSDP checkpoint does not know alpha, and writes 0 to be filled in."""
    model, source = llama
    folder, _ = adapter(tmp_path / "lora", SHAPES, lora_alpha=0)
    note = "its pairs add nothing: lora_alpha is 0"
    report = json.loads(run("inspect", source, "--adapter", folder, "--json").stdout)
    assert report["adapters"][0]["notes"] == [note]
    outcome = convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert outcome["notes"] == [f"{folder}: {note}"]
    assert_tensors(tmp_path / "merged", model.dense)


def test_an_adapter_of_an_adapter(llama, tmp_path):
    """G.O.D#1180: a chain, whose last link names the one before it as its base."""
    model, source = llama
    first, pairs = adapter(tmp_path / "first", SHAPES)
    second, _ = adapter(tmp_path / "second", SHAPES, base_model_name_or_path=str(first))
    outcome = convert("merge", source, tmp_path / "alone", "--adapter", second)
    assert any(
        f"trained on another adapter, which it needs beside it: {first}" in note
        for note in outcome["notes"]
    )
    convert("merge", source, tmp_path / "chain", "--adapter", first, "--adapter", second)
    twice = {name: (a, 2 * b) for name, (a, b) in pairs.items()}
    assert_tensors(tmp_path / "chain", model.merged(twice))


def test_an_adapter_before_training(llama, tmp_path):
    """Soup#335: an adapter whose lora_B are all zero looks like any other."""
    model, source = llama
    pairs = {name: (a, 0 * b) for name, (a, b) in pairs_of(SHAPES).items()}
    folder = write_adapter(tmp_path / "lora", lora_tensors(pairs), lora_config(pairs))
    outcome = convert("merge", source, tmp_path / "merged", "--adapter", folder)
    assert "its pairs add nothing: one matrix of each is zero" in outcome["notes"][0]
    assert_tensors(tmp_path / "merged", model.dense)
