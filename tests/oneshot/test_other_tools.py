"""AWQ and GPTQ checkpoints that real tools wrote, through every command, transformers and vLLM."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from int4_lora.integration import annotate, open_checkpoint
from int4_lora.integration.checkpoint.inspect import inspect
from int4_lora.integration.checkpoint.verify import verify
from int4_lora.integration.demo import models
from int4_lora.integration.huggingface import Int4Linear, load_packed
from int4_lora.reference import dequantize
from int4_lora.reference.bounds import FORMATS
from support.conversion import convert, tensors_of
from support.served_beside import PYTHON, assert_served_right
from support.tiny import LLAMA
from support.upstream_versions import IGNORES_G_IDX
from support.weights import bits_of
from support.whole_models import assert_as_good, in_float64

MODULES = 7 * LLAMA["num_hidden_layers"]
TOKENS = torch.arange(1, 25).view(2, 12) * 7 % LLAMA["vocab_size"]


def assert_decoded(weights, other):
    """Check that weights ``[out, in]`` are those that the tool decodes, bit for bit."""
    assert len(weights) == len(other.decoded) == MODULES
    for name, theirs in other.decoded.items():
        assert weights[name].dtype == theirs.dtype
        assert torch.equal(bits_of(weights[name]), bits_of(theirs.T)), name


def assert_merged(merged, other, adapter):
    """Check that every merged weight is W + alpha / rank * B A, rounded once."""
    pairs = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, theirs in other.decoded.items():
        a, b = (
            pairs[f"base_model.model.{name}.lora_{side}.weight"].double() for side in ("A", "B")
        )
        exact = theirs.T.double() + config["lora_alpha"] / config["r"] * (b @ a)
        got = merged[f"{name}.weight"]
        assert got.dtype == theirs.dtype
        form = FORMATS[got.dtype]
        allowed = 1.001 * (form.u * exact.abs() + form.output_underflow)
        assert bool(((got.double() - exact).abs() <= allowed).all()), name


def test_every_weight_is_the_one_that_a_tool_decodes(other):
    checkpoint = open_checkpoint(other.folder)
    packed = {name: checkpoint.packed_weight(name) for name in checkpoint.modules()}
    assert_decoded({name: dequantize(weight) for name, weight in packed.items()}, other)
    ordered = other.name == "gptqmodel desc_act"
    verdict = "upstream_wrong" if ordered and IGNORES_G_IDX else "same"
    assert {module.verdict for module in verify(checkpoint)} == {verdict}
    described = inspect(checkpoint).modules
    assert len(described) == MODULES
    symmetric = other.name in (
        "gptqmodel", "gptqmodel 8 bits", "gptqmodel awq", "auto_round gptq",
    )  # fmt: skip
    for module in described:
        assert (module.packed, module.symmetric) == (True, symmetric)
        assert module.bits == (8 if other.name == "gptqmodel 8 bits" else 4)
        assert module.g_idx == ordered
        assert module.nan_scales == module.infinite_scales == 0


def test_it_is_unpacked_converted_and_merged(other, tiny_adapters, tmp_path):
    convert("unpack", other.folder, tmp_path / "dense")
    unpacked = tensors_of(tmp_path / "dense")
    assert_decoded({name: unpacked[f"{name}.weight"] for name in other.decoded}, other)
    convert("convert", other.folder, tmp_path / "converted")
    converted = open_checkpoint(tmp_path / "converted")
    packed = {name: converted.packed_weight(name) for name in converted.modules()}
    assert_decoded({name: dequantize(weight) for name, weight in packed.items()}, other)
    adapter = tiny_adapters["b"]  # on every linear layer
    convert("merge", other.folder, tmp_path / "merged", "--adapter", adapter)
    assert_merged(tensors_of(tmp_path / "merged"), other, adapter)
    to = f"int{8 if other.name == 'gptqmodel 8 bits' else 4}"
    options = ("--adapter", adapter, "--to", to, "--max-error", "1")
    outcome = convert("merge", tmp_path / "converted", tmp_path / "packed", *options)
    assert len(open_checkpoint(tmp_path / "packed").modules()) == MODULES, outcome


def test_it_is_kept_packed_in_transformers(other, tmp_path):
    if other.name == "gptqmodel desc_act" and IGNORES_G_IDX:
        with pytest.raises(ValueError, match="actorder='group' has been removed"):
            load_packed(other.folder)  # transformers asks compressed-tensors for the config
        return
    convert("unpack", other.folder, tmp_path / "dense")
    made = AutoModelForCausalLM.from_pretrained
    arguments = {"attn_implementation": "eager"}
    truth = made(tmp_path / "dense", dtype=torch.float64, **arguments).double()
    theirs = made(tmp_path / "dense", dtype=torch.bfloat16, **arguments)
    ours = load_packed(other.folder, dtype=torch.bfloat16, **arguments)
    assert sum(isinstance(module, Int4Linear) for module in ours.modules()) == MODULES
    with torch.no_grad():
        right = in_float64(truth, TOKENS).logits
        assert_as_good(ours(TOKENS).logits, theirs(TOKENS).logits, right)


@pytest.mark.skipif(PYTHON is None, reason="INT4_LORA_VLLM_PYTHON names no Python with vLLM")
def test_vllm_serves_it_with_adapters(other, tiny_adapters, tmp_path, monkeypatch):
    """As it was written; and where columns have an order, also converted and annotated."""
    monkeypatch.setattr(models, "decompress", lambda _, name: other.decoded[name].T.contiguous())
    metadata = assert_served_right(other.folder, other.folder, tiny_adapters, tmp_path)
    assert metadata == [True, None, None]
    converted = tmp_path / "converted"
    convert("convert", other.folder, converted)
    annotated = annotate(converted)
    assert annotated.lora_compatible, annotated.incompatible_because
    if other.name == "gptqmodel desc_act":
        metadata = assert_served_right(converted, other.folder, tiny_adapters, tmp_path)
        assert metadata == [True, True, list(annotated.lora_target_modules)]
