"""lora_targets: what adapters can stand on, what is suggested, and why a model is not fit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from int4_lora.integration.annotation.targets import lora_targets
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor, read_headers
from int4_lora.integration.checkpoint.scheme import Scheme

STORED = StoredTensor(Path("model.safetensors"), "I32", (1, 1), 0, 4, (0, 0, 0, 0))
LAYERS = ("model.layers.0", "model.layers.1")


def scheme(**changes):
    usual = {
        "format": "pack-quantized",
        "kind": "int",
        "bits": 4,
        "symmetric": True,
        "strategy": "group",
        "group_size": 128,
        "actorder": None,
        "activations": False,
    }
    return Scheme(**{**usual, **changes})


def checkpoint(quantised, dense=(), more=(), ignore=()):
    schemes = dict.fromkeys(quantised, scheme()) if not isinstance(quantised, dict) else quantised
    names = [f"{name}.weight_packed" for name in schemes] + [f"{name}.weight" for name in dense]
    quantization = {"quant_method": "compressed-tensors", "ignore": [*ignore]}
    config = {"quantization_config": quantization}
    return Checkpoint(Path("folder"), config, dict.fromkeys([*names, *more], STORED), schemes)


def in_layers(*names):
    return [f"{layer}.{name}" for layer in LAYERS for name in names]


def test_a_llama():
    projections = in_layers("self_attn.q_proj", "mlp.down_proj")
    dense = ["lm_head", "model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"]
    found = lora_targets(checkpoint(projections, dense))
    assert found.compatible
    assert found.incompatible_because == ()
    assert found.modules == found.suggested == ("down_proj", "q_proj")


@pytest.mark.parametrize(
    ("quantised", "dense", "modules", "suggested"),
    [
        pytest.param(  # one layer's is dense: PEFT's name would hit it too
            [*in_layers("q_proj"), "model.layers.0.o_proj"], ["model.layers.1.o_proj"],
            ("o_proj", "q_proj"), ("q_proj",), id="dense in one layer",
        ),
        pytest.param(
            in_layers("q_proj", "o_proj"), ["vision.layers.0.q_proj"],
            ("o_proj", "q_proj"), ("o_proj",), id="dense in a vision tower",
        ),
        pytest.param(
            in_layers("q_proj", "experts.3.up_proj"), [],
            ("q_proj", "up_proj"), ("q_proj",), id="experts",
        ),
        pytest.param(
            in_layers("q_proj", "mlp.gate", "router", "shared_expert_gate"), [],
            ("gate", "q_proj", "router", "shared_expert_gate"), ("q_proj",), id="routers",
        ),
        pytest.param(
            [*in_layers("q_proj"), "multi_modal_projector.linear_1"], [],
            ("linear_1", "q_proj"), ("q_proj",), id="outside the layers",
        ),
        pytest.param(
            {**dict.fromkeys(in_layers("q_proj"), scheme()), LAYERS[0] + ".k_proj": scheme(),
             LAYERS[1] + ".k_proj": scheme(bits=8), LAYERS[0] + ".v_proj": scheme(bits=8)}, [],
            ("k_proj", "q_proj"), ("q_proj",), id="8 bits",
        ),
        pytest.param(
            {**dict.fromkeys(in_layers("q_proj"), scheme()),
             LAYERS[0] + ".k_proj": scheme(activations=True),
             LAYERS[0] + ".v_proj": scheme(format="float-quantized", kind="float", bits=8)}, [],
            ("q_proj",), ("q_proj",), id="other formats",
        ),
    ],
)  # fmt: skip
def test_what_is_suggested_names_nothing_else(quantised, dense, modules, suggested):
    found = lora_targets(checkpoint(quantised, dense))
    assert found.compatible
    assert (found.modules, found.suggested) == (modules, suggested)


@pytest.mark.parametrize(
    ("quantised", "reason"),
    [
        (
            dict.fromkeys(in_layers("q_proj"), scheme(bits=8)),
            "no linear layer is pack-quantized INT4 alone: model.layers.0.q_proj is "
            "pack-quantized of int, 8 bits",
        ),
        (
            dict.fromkeys(in_layers("q_proj"), scheme(activations=True)),
            "no linear layer is pack-quantized INT4 alone: model.layers.0.q_proj is "
            "pack-quantized of int, 4 bits, with quantised activations",
        ),
        (
            in_layers("experts.0.up_proj"),
            "only experts or the vocabulary are INT4, and their adapters are not computed here: "
            "model.layers.0.experts.0.up_proj",
        ),
        (
            dict.fromkeys(in_layers("q_proj"), scheme(actorder="group")),
            "model.layers.0.q_proj is ordered by activation, which vLLM refuses: quantise with "
            "actorder static or none, and 1 more like it",
        ),
        (
            {**dict.fromkeys(in_layers("k_proj"), scheme()), "x.1.up": scheme(actorder="group")},
            "x.1.up is ordered by activation, which vLLM refuses: quantise with actorder static "
            "or none",
        ),
        (
            {**dict.fromkeys(in_layers("k_proj"), scheme()), "x.1.up": scheme(strategy="tensor")},
            "x.1.up is of a strategy that vLLM does not serve: quantise by channel or group",
        ),
        (
            [*in_layers("q_proj"), "lm_head"],
            "lm_head is quantised, and vLLM cannot put adapters beside it: add it to the ignore "
            "list",
        ),
    ],
)
def test_why_a_model_is_not_compatible(quantised, reason):
    found = lora_targets(checkpoint(quantised))
    assert not found.compatible
    assert found.incompatible_because == (reason,)


def test_a_packed_module_on_the_ignore_list():
    names = [*in_layers("q_proj"), "mtp.layers.0.q_proj"]
    found = lora_targets(checkpoint(names, ignore=["lm_head", "re:.*mtp.*"]))
    assert found.incompatible_because == (
        "mtp.layers.0.q_proj is packed, but on the ignore list, so that vLLM expects it dense: "
        "take it off the list",
    )


@pytest.mark.parametrize("actorder", [None, "group"])
@pytest.mark.parametrize(
    ("g_idx", "reason"),
    [
        ([0, 1, 1, 0], "is ordered by activation, which vLLM refuses"),
        ([-1] * 4, "stores a weight_g_idx in column order, which vLLM does not load"),
        ([0] * 4, "stores a weight_g_idx in column order, which vLLM does not load"),
    ],
)
def test_a_stored_g_idx_is_an_order_unless_it_is_that_of_the_columns(
    tmp_path, g_idx, reason, actorder
):
    """VLLM 0.32 has no parameter for weight_g_idx, whatever its values are."""
    name = in_layers("q_proj")[1]
    file = tmp_path / "model.safetensors"
    save_file({f"{name}.weight_g_idx": torch.tensor(g_idx, dtype=torch.int32)}, file)
    opened = checkpoint({name: scheme(actorder=actorder)})
    opened = dataclasses.replace(opened, path=tmp_path, tensors=opened.tensors | read_headers(file))
    (found,) = lora_targets(opened).incompatible_because
    assert found.startswith(f"{name} {reason}")


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "transformer.wte", "embed_out"])
def test_vocabulary_is_no_target(name):
    found = lora_targets(checkpoint([*in_layers("q_proj"), name]))
    assert found.modules == found.suggested == ("q_proj",)
    assert [reason.split()[0] for reason in found.incompatible_because] == [name]


def test_every_reason_is_given():
    found = lora_targets(checkpoint({"lm_head": scheme(strategy="block", actorder="group")}))
    assert len(found.incompatible_because) == 4
    assert found.modules == found.suggested == ()
