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
OF_THE_VOCABULARY = (
    "is quantised, and vLLM serves only a vocabulary whose lm_head alone is packed, in 4 bits, on "
    "all devices: add it to the ignore list"
)
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
            ("k_proj", "q_proj", "v_proj"), ("k_proj", "q_proj", "v_proj"), id="8 bits beside 4",
        ),
        pytest.param(
            {**dict.fromkeys(in_layers("q_proj"), scheme(bits=8)), "lm_head": scheme()}, [],
            ("q_proj",), ("q_proj",), id="8 bits and a head of 4",
        ),
        pytest.param(
            dict.fromkeys(in_layers("q_proj", "k_proj"), scheme(actorder="group")), [],
            ("k_proj", "q_proj"), ("k_proj", "q_proj"), id="activation order",
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
            dict.fromkeys(in_layers("q_proj"), scheme(activations=True)),
            "no linear layer is pack-quantized in its weights alone: model.layers.0.q_proj is "
            "pack-quantized of int, 4 bits, with quantised activations",
        ),
        (
            in_layers("experts.0.up_proj"),
            "only experts or the vocabulary are packed, and their adapters are not computed here: "
            "model.layers.0.experts.0.up_proj",
        ),
        (
            {**dict.fromkeys(in_layers("k_proj"), scheme()), "x.1.up": scheme(strategy="tensor")},
            "x.1.up is of a strategy that vLLM does not serve: quantise by channel or group",
        ),
        (
            {**dict.fromkeys(in_layers("q_proj"), scheme()), "lm_head": scheme(bits=8)},
            f"lm_head {OF_THE_VOCABULARY}",
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


def with_orders(folder, orders, actorder):
    """Return a checkpoint of some modules in the first layer, each with a ``weight_g_idx``."""
    named = {f"{LAYERS[0]}.{name}": order for name, order in orders.items()}
    file = folder / "model.safetensors"
    tensors = {
        f"{name}.weight_g_idx": torch.tensor(order, dtype=torch.int32)
        for name, order in named.items()
        if order is not None
    }
    save_file(tensors, file)
    opened = checkpoint(dict.fromkeys(named, scheme(actorder=actorder)))
    tensors = opened.tensors | read_headers(file)
    return dataclasses.replace(opened, path=folder, tensors=tensors)


@pytest.mark.parametrize("g_idx", [[0, 1, 1, 0], [-1] * 4, [0] * 4])
def test_a_stored_g_idx_is_loaded_where_the_config_names_an_order(tmp_path, g_idx):
    """Otherwise vLLM has no parameter for weight_g_idx, whatever its values are."""
    assert lora_targets(with_orders(tmp_path, {"q_proj": g_idx}, "group")).compatible
    (reason,) = lora_targets(with_orders(tmp_path, {"q_proj": g_idx}, None)).incompatible_because
    assert reason.startswith(f"{LAYERS[0]}.q_proj stores a weight_g_idx, which vLLM does not load")


@pytest.mark.parametrize(
    ("orders", "names"),
    [
        ({"q_proj": [0, 1, 1, 0], "k_proj": [0, 1, 1, 0], "o_proj": [1, 0, 0, 1]}, ()),
        ({"q_proj": [0, 1, 1, 0], "k_proj": [1, 0, 1, 0]}, ("k_proj",)),
        ({"q_proj": [0, 1, 1, 0], "k_proj": None}, ("k_proj",)),
        ({"q_proj": [0, 0, 0, 0], "k_proj": None, "v_proj": [-1] * 4}, ()),  # all in column order
        ({"gate_proj": [0, 1, 1, 0], "up_proj": [0, 1, 0, 1]}, ("up_proj",)),
    ],
)
def test_modules_that_vllm_merges_have_one_activation_order(tmp_path, orders, names):
    found = lora_targets(with_orders(tmp_path, orders, "group")).incompatible_because
    assert [reason.split()[0] for reason in found] == [f"{LAYERS[0]}.{name}" for name in names]
    assert all("has another activation order than" in reason for reason in found)


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "transformer.wte", "embed_out"])
def test_vocabulary_is_no_target(name):
    found = lora_targets(checkpoint([*in_layers("q_proj"), name]))
    assert found.modules == found.suggested == ("q_proj",)
    reasons = [] if name == "lm_head" else [f"{name} {OF_THE_VOCABULARY}"]
    assert [*found.incompatible_because] == reasons


def test_every_reason_is_given():
    found = lora_targets(checkpoint({"lm_head": scheme(strategy="block", bits=8)}))
    assert len(found.incompatible_because) == 3
    assert found.modules == found.suggested == ()
