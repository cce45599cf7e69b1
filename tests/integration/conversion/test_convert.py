"""int4-lora convert: AWQ and GPTQ become pack-quantized, and no weight changes."""

import json
import shutil

import pytest
import torch

from int4_lora.integration import open_checkpoint
from int4_lora.integration.conversion import convert_checkpoint
from int4_lora.reference import dequantize
from support import layouts
from support.checkpoints import Q_PROJ
from support.conversion import SMALL, bytes_of, convert, refusal, run, tensors_of
from support.other_checkpoints import CONFIGS, VARIANTS, Other, make
from support.weights import bits_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_weight_changes(tmp_path, variant):
    model, source = make(tmp_path / "x", variant, shards=3)
    convert("convert", source, tmp_path / "result")
    checkpoint = open_checkpoint(tmp_path / "result")
    assert len(checkpoint.modules()) == 14
    for name in checkpoint.modules():
        weight = checkpoint.packed_weight(name)
        assert torch.equal(bits_of(dequantize(weight)), bits_of(model.dense[f"{name}.weight"]))
        symmetric = ("gptq_v1", "gptq_channel", "gptq_8_bits", "awq_sym")
        assert weight.symmetric == (variant in symmetric)
        assert (weight.g_idx is not None) == (variant == "gptq_desc_act")
        assert weight.bits == (8 if variant == "gptq_8_bits" else 4)
    others = {name: tensor for name, tensor in model.dense.items() if "_proj" not in name}
    written = tensors_of(tmp_path / "result")
    assert {name for name in written if "_proj" not in name} == set(others)
    assert all(torch.equal(written[name], tensor) for name, tensor in others.items())
    quantization = checkpoint.config["quantization_config"]
    assert quantization["ignore"] == ["model.embed_tokens", "lm_head"]
    assert list(quantization["config_groups"]) == ["group_0"]


def test_a_g_idx_goes_along_and_is_announced(tmp_path):
    model, source = make(tmp_path / "x", "gptq_desc_act")
    outcome = convert("convert", source, tmp_path / "result")
    assert "14 modules have a weight_g_idx: vLLM 0.30" in outcome["notes"][0]
    checkpoint = open_checkpoint(tmp_path / "result")
    assert torch.equal(checkpoint.packed_weight(Q_PROJ).g_idx, model.stored[f"{Q_PROJ}.g_idx"])
    (group,) = checkpoint.config["quantization_config"]["config_groups"].values()
    assert group["weights"]["actorder"] == "group"


@pytest.mark.versions
@pytest.mark.parametrize("variant", ["gptq_v1", "gptq_v2_asym", "awq"])
def test_upstream_decompresses_the_result_to_the_same_bits(tmp_path, variant):
    model, source = make(tmp_path / "x", variant)
    convert_checkpoint(source, tmp_path / "result")
    layouts.assert_dense(model, tmp_path / "result", tmp_path / "dense")


@pytest.mark.versions
def test_transformers_computes_the_logits_of_the_dense_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    _, source = make(tmp_path / "x", "gptq_v1")
    logits = []
    for command in ("unpack", "convert"):
        convert(command, source, tmp_path / command)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / command, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(torch.arange(24).view(2, 12)).logits)
    torch.testing.assert_close(*logits)


def test_modules_of_other_schemes_get_groups_of_their_own(tmp_path):
    model = Other("gptq").llama()
    model.packed(Q_PROJ, 64, 64, bits=8, size=16)
    dynamic = {r".*layers\.0\..*q_proj": {"bits": 8, "group_size": 16}}
    source = model.save(tmp_path / "x", {**CONFIGS["gptq"], "dynamic": dynamic})
    convert("convert", source, tmp_path / "result")
    checkpoint = open_checkpoint(tmp_path / "result")
    first, second = checkpoint.config["quantization_config"]["config_groups"].values()
    assert (first["targets"], second["targets"]) == (["Linear"], [Q_PROJ])
    for name in checkpoint.modules():
        dense = dequantize(checkpoint.packed_weight(name))
        assert torch.equal(dense, model.dense[f"{name}.weight"]), name


def test_a_tied_head_is_ignored(tmp_path):
    """It is no tensor, but transformers has a linear layer for it."""
    source = Other("awq").llama(head=None).save(tmp_path / "x", CONFIGS["awq"])
    convert("convert", source, tmp_path / "result")
    quantization = open_checkpoint(tmp_path / "result").config["quantization_config"]
    assert quantization["ignore"] == ["model.embed_tokens", "lm_head"]


def test_a_run_continues_where_another_stopped(tmp_path):
    _, source = make(tmp_path / "x", "awq")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    files = convert("convert", source, whole, "--max-shard-size", "0.00002")["files"]
    assert len(files) > 2
    outcome = convert("convert", source, parts, "--max-shard-size", "0.00002", "--shard", "1/2")
    assert not outcome["finished"]
    assert not parts.exists()
    outcome = convert("convert", source, parts, "--max-shard-size", "0.00002")
    assert 0 < len(outcome["written"]) < len(files)
    assert bytes_of(parts) == bytes_of(whole)
    assert not (tmp_path / "parts.partial").exists()


def test_what_cannot_be_converted_is_left_alone(tmp_path, tiny_models):
    said = refusal("convert", tiny_models["g32"], tmp_path / "result")
    assert "quant_method is 'compressed-tensors' already" in " ".join(said.split())
    _, source = make(tmp_path / "x", "awq")
    (tmp_path / "there").mkdir()
    result = run("convert", source, tmp_path / "there", *SMALL)
    assert result.exit_code == 2
    assert "--force replaces it" in " ".join(result.stderr.split())
    assert run("convert", source, source).exit_code == 2
    with pytest.raises(ValueError, match="to must be 'pack-quantized', got 'awq'"):
        convert_checkpoint(source, tmp_path / "y", to="awq")


def test_config_json_keeps_everything_else(tmp_path):
    _, source = make(tmp_path / "x", "awq")
    shutil.copy(source / "config.json", source / "generation_config.json")
    convert("convert", source, tmp_path / "result")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "result" / "config.json").read_text())
    del before["quantization_config"], after["quantization_config"]
    assert after == before
    assert (tmp_path / "result" / "generation_config.json").exists()
