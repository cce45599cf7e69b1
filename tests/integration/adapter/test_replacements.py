"""Tensors that replace those of the base: read from what PEFT saved, and refused by name."""

import pytest
import torch
from safetensors.torch import load_file

from int4_lora.integration import read_adapter
from support.trained import WITH_TODAYS_PEFT, edit, llama, trained

pytestmark = WITH_TODAYS_PEFT

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def test_an_embedding_gets_what_peft_adds(tmp_path):
    model = llama()
    before = model.model.embed_tokens.weight.detach().clone()
    merged = trained(model, tmp_path, target_modules=["embed_tokens"], use_rslora=True)
    merged = merged.merge_and_unload()
    module = read_adapter(tmp_path).modules["model.embed_tokens"]
    expected = merged.model.embed_tokens.weight.detach() - before
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(module.scaling * (module.b @ module.a), expected)


def test_copies_and_trained_modules(tmp_path):
    settings = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["k_proj", "norm"]}
    model = trained(llama(), tmp_path, **settings)
    adapter = read_adapter(tmp_path)
    saved = model.base_model.model.model.layers[0].self_attn.k_proj.modules_to_save["default"]
    tied = {name: one.tied for name, one in adapter.replacements.items()}
    assert tied == {
        HEAD: True,
        "model.norm.weight": False,
        **{f"model.layers.{n}.self_attn.k_proj.weight": False for n in (0, 1)},
        **{f"model.layers.{n}.input_layernorm.weight": False for n in (0, 1)},
        **{f"model.layers.{n}.post_attention_layernorm.weight": False for n in (0, 1)},
    }
    assert all(one.rows is None for one in adapter.replacements.values())
    found = adapter.replacements["model.layers.0.self_attn.k_proj.weight"].tensor
    assert torch.equal(found, saved.weight)
    assert torch.equal(adapter.replacements[HEAD].tensor, model.base_model.model.lm_head.weight)
    assert "lm_head" in adapter.modules


@pytest.mark.parametrize("indices", [[7, 3], {"embed_tokens": [7, 3], "lm_head": [0]}])
def test_rows_of_tokens(tmp_path, indices):
    trained(llama(), tmp_path, target_modules=["q_proj"], trainable_token_indices=indices)
    found = read_adapter(tmp_path).replacements
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {EMBED: [7, 3]} | ({HEAD: [0]} if isinstance(indices, dict) else {})
    assert {name: one.rows.tolist() for name, one in found.items()} == expected
    for name, one in found.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.token_adapter"
        assert torch.equal(one.tensor, tensors[f"{key}.trainable_tokens_delta"])


def test_the_pair_that_is_saved_again_for_a_tied_head_is_the_embeddings(tmp_path):
    model = llama(tie_word_embeddings=True)
    trained(model, tmp_path, target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert {*read_adapter(tmp_path).modules} == {"model.embed_tokens"}
    edit(tmp_path, alpha_pattern={"lm_head": 3})
    with pytest.raises(ValueError, match="scaling must equal those of the embeddings"):
        read_adapter(tmp_path)
    key = "base_model.model.lm_head.lora_B.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: tensors[key] + 1}), alpha_pattern={})
    with pytest.raises(ValueError, match="lm_head: ensure_weight_tying is set and target_modules"):
        read_adapter(tmp_path)


def add(**named):
    def change(tensors):
        for name, value in named.items():
            tensors["base_model.model." + name] = value

    return change


@pytest.mark.parametrize(
    ("settings", "change", "config", "error", "message"),
    [
        ({}, {"lm_head.base_layer.weight": torch.ones(2)}, {}, ValueError,
         "lm_head has no lora_A and lora_B, so that PEFT would ignore the key"),
        ({"target_modules": ["lm_head"]}, {"lm_head.weight": torch.ones(2)}, {}, ValueError,
         "lm_head.weight means the same tensor as base_model.model.lm_head.base_layer.weight"),
        ({}, {"model.norm.weight": torch.ones(2)}, {}, ValueError,
         "norm.weight is a whole tensor of the model, and PEFT saves those of embeddings,"),
        ({}, {"model.layers.0.self_attn.q_proj.weight": torch.ones(2)},
         {"modules_to_save": ["q_proj"]}, ValueError,
         "q_proj has lora_A and lora_B too: PEFT trains one or the other"),
        ({}, {"model.norm.weight": torch.ones(2, dtype=torch.int32)},
         {"modules_to_save": ["norm"]}, TypeError,
         "model.norm.weight must be float to replace a weight, got int32"),
        ({}, {"model.norm.weight": torch.tensor([torch.nan])},
         {"modules_to_save": ["norm"]}, ValueError,
         "model.norm.weight must be finite to replace a weight"),
        ({"trainable_token_indices": [1, 2]}, {}, {"trainable_token_indices": [1, 2, 3]},
         ValueError, r"must be \[3, ...\] by trainable_token_indices, got \[2, 64\]"),
        ({"trainable_token_indices": [1, 2]}, {}, {"trainable_token_indices": None},
         TypeError, "trainable_token_indices must be token ids, got None"),
        ({"trainable_token_indices": [1, 2]}, {}, {"trainable_token_indices": [1, -2]},
         TypeError, r"trainable_token_indices must be token ids, got \[1, -2\]"),
        ({"trainable_token_indices": [1, 2]}, {}, {"trainable_token_indices": [1, 1]},
         ValueError, r"trainable_token_indices must name each token once, got \[1, 1\]"),
        ({"trainable_token_indices": [1, 2]}, {}, {"trainable_token_indices": {"lm_head": [1, 2]}},
         ValueError, "names lm_head, and no rows of it were saved"),
        ({"trainable_token_indices": [1, 2]}, {},
         {"trainable_token_indices": {"embed_tokens": [1, 2], "model.embed_tokens": [3, 4]}},
         ValueError, r"must name model.embed_tokens once, and names \['embed_tokens', 'model"),
        ({"trainable_token_indices": [1, 2]}, {},
         {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4]}}, ValueError,
         "trainable_token_indices names lm_head, and no rows of it were saved"),
        ({"trainable_token_indices": [1, 2]}, {EMBED: torch.ones(2)}, {},
         ValueError, "model.embed_tokens has a pair or a whole weight too"),
        ({"target_modules": ["embed_tokens"]}, {}, {"target_modules": ["q_proj"]}, ValueError,
         "adapter_config.json does not target it: PEFT would ignore it"),
        ({"target_modules": ["embed_tokens"]}, {}, {"r": 3}, ValueError,
         r"lora_embedding_A must be \[3, num_embeddings\] and .* got \[4, 80\] and \[64, 4\]"),
        ({}, {}, {"modules_to_save": "lm_head"}, ValueError, "modules_to_save must be strings"),
    ],
)  # fmt: skip
def test_refused(tmp_path, settings, change, config, error, message):
    trained(llama(), tmp_path, **{"target_modules": ["q_proj"], **settings}, steps=0)
    edit(tmp_path, add(**change), **config)
    with pytest.raises(error, match=message):
        read_adapter(tmp_path)


def test_a_module_to_save_without_a_tensor_is_noted(tmp_path):
    trained(llama(), tmp_path, target_modules=["q_proj"], modules_to_save=["norm"], steps=0)
    assert not read_adapter(tmp_path).notes
    edit(tmp_path, modules_to_save=["norm", "lm_head"])
    assert read_adapter(tmp_path).notes == (
        "modules_to_save names lm_head, and the file holds no tensor of it",
    )


def test_an_adapter_of_replacements_alone(tmp_path):
    trained(llama(), tmp_path, target_modules=["q_proj"], modules_to_save=["norm"], steps=0)
    edit(tmp_path, lambda tensors: [tensors.pop(key) for key in [*tensors] if "lora" in key])
    adapter = read_adapter(tmp_path)
    assert not adapter.modules
    assert "model.norm.weight" in adapter.replacements
