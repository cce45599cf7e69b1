"""The options of the vLLM backend, and what a checkpoint says about adapters; without vLLM."""

import json

import pytest

from int4_lora.integration.vllm_plugin.metadata import (
    LoRAMetadata,
    outside_targets,
    read_metadata,
)
from int4_lora.integration.vllm_plugin.options import Options, read_options


@pytest.mark.parametrize("given", [None, {}, {"other": {"backend": 3}}, {"int4_lora": {}}])
def test_nothing_given_means_the_defaults(given):
    assert read_options(given) == Options("auto", "custom-op", 0, True, "balanced")


def test_every_option():
    given = {"backend": "stock-base", "in_graph": "inlined", "cache_bytes": 7, "warm_up": False}
    options = Options("stock-base", "inlined", 7, False, "decode")
    assert read_options({"int4_lora": {**given, "favour": "decode"}}) == options


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"backand": "auto"}, ValueError, "no option 'backand': did you mean 'backend'"),
        ({"speed": 1}, ValueError, "are backend, in_graph, cache_bytes, warm_up, favour"),
        ({"backend": "fast"}, ValueError, "must be 'auto' or 'compiled' or 'stock-base', got 'fas"),
        (
            {"favour": "both"},
            ValueError,
            "favour must be 'balanced' or 'decode' or 'prefill', got 'both'",
        ),
        ({"favour": ["decode"]}, TypeError, "favour must be str, got list"),
        ({"favor": "decode"}, ValueError, "no option 'favor': did you mean 'favour'"),
        ({"backend": None}, TypeError, "backend must be str, got NoneType"),
        ({"cache_bytes": "1 GB"}, TypeError, "cache_bytes must be int, got str"),
        ({"cache_bytes": True}, TypeError, "cache_bytes must be int, got bool"),
        ({"cache_bytes": -1}, ValueError, "must not be negative, got -1"),
        ({"warm_up": 1}, TypeError, "warm_up must be bool, got int"),
        ("fast", TypeError, "must be a dict of options, got str"),
    ],
)
def test_a_wrong_option_is_named(given, error, message):
    with pytest.raises(error, match=message):
        read_options({"int4_lora": given})


def test_what_a_checkpoint_says_is_found_in_each_place(tmp_path):
    fields = {"lora_compatible": True, "lora_target_modules": ["q_proj"]}
    right = LoRAMetadata(True, ("q_proj",))
    assert read_metadata({}) == LoRAMetadata(None, None)
    assert read_metadata(fields) == right
    assert read_metadata({"quantization_config": fields}) == right
    (tmp_path / "lora_metadata.json").write_text(json.dumps(fields))
    assert read_metadata({}, tmp_path) == right
    assert read_metadata(fields, tmp_path) == right


def test_places_that_contradict_are_both_named(tmp_path):
    (tmp_path / "lora_metadata.json").write_text('{"lora_compatible": false}')
    with pytest.raises(ValueError, match=r"True in config.json and False in .*lora_metadata.json"):
        read_metadata({"lora_compatible": True}, tmp_path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", ValueError, r"is no JSON \(.*\): write it again with int4-lora annotate, or remove"),
        ("[]", ValueError, "must be a JSON object, got list"),
        ('{"lora_compatible": 1}', TypeError, "must be true or false, got 1"),
        ('{"lora_target_modules": "q_proj"}', TypeError, "must be a list of names"),
        ('{"lora_target_modules": [1]}', TypeError, "must be a list of names"),
    ],
)
def test_a_wrong_file_is_named(text, error, message, tmp_path):
    (tmp_path / "lora_metadata.json").write_text(text)
    with pytest.raises(error, match=message) as caught:
        read_metadata({}, tmp_path)
    assert "lora_metadata.json" in str(caught.value)


def test_modules_outside_the_targets():
    some = LoRAMetadata(True, ("q_proj", "down_proj", "model.layers.0.mlp.gate_up_proj"))
    qkv = ("q_proj", "k_proj", "v_proj")
    assert outside_targets(some, "model.layers.0.self_attn.qkv_proj", qkv) == ["k_proj", "v_proj"]
    assert outside_targets(some, "model.layers.0.mlp.down_proj", ("down_proj",)) == []
    assert outside_targets(some, "model.layers.0.mlp.gate_up_proj", ("gate_proj", "up_proj")) == []
    assert outside_targets(LoRAMetadata(), "model.layers.0.mlp.down_proj", ("down_proj",)) == []
