"""The embeddings and the head of a model, by name, and whether they are one tensor."""

import pytest
import torch

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.tied_embeddings import (
    find_vocabulary,
    is_tied,
    may_be_tied_to,
    ties_of,
    untied,
)
from support.layouts import Model, quantization


def checkpoint(folder, tensors, packed=(), **config):
    model = Model()
    for name in packed:
        model.packed(name, 48, 64)
    model.packed("model.layers.0.self_attn.q_proj", 64, 64)
    for name in tensors:
        model.put(name, torch.arange(48.0 * 64).view(48, 64))
    groups = quantization(ignore=[])
    groups["config_groups"]["group_0"]["targets"] = ["Linear", "Embedding"]
    return open_checkpoint(model.save(folder / "model", groups, config))


@pytest.mark.parametrize(
    ("embeddings", "head"),
    [
        ("model.embed_tokens", "lm_head"),
        ("embed_tokens", "lm_head"),
        ("transformer.wte", "lm_head"),
        ("gpt_neox.embed_in", "embed_out"),
        ("model.language_model.embed_tokens", "lm_head"),
        ("language_model.model.embed_tokens", "language_model.lm_head"),
        ("model.language_model.model.embed_tokens", "model.language_model.lm_head"),
        ("text_model.model.embed_tokens", "text_model.lm_head"),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
def test_names(tmp_path, embeddings, head, stored):
    names = [f"{embeddings}.weight", *([f"{head}.weight"] if stored else [])]
    found = find_vocabulary(checkpoint(tmp_path, names))
    assert (found.embeddings, found.head, found.head_is_stored) == (embeddings, head, stored)


def test_two_embeddings_are_none(tmp_path):
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    assert find_vocabulary(checkpoint(tmp_path, names)) is None


def test_a_head_beside_embeddings_of_an_unknown_layout_is_the_one_that_is_stored(tmp_path):
    names = ["thinker.model.embed_tokens.weight", "thinker.lm_head.weight"]
    found = find_vocabulary(checkpoint(tmp_path, names))
    assert (found.head, found.head_is_stored) == ("thinker.lm_head", True)
    assert find_vocabulary(checkpoint(tmp_path / "none", names[:1])) is None


@pytest.mark.parametrize(
    ("stored", "config", "expected"),
    [
        ([], {"tie_word_embeddings": True}, True),
        ([], {"tie_word_embeddings": False}, False),
        (["a.lm_head.weight"], {"tie_word_embeddings": True}, False),
        ([], {"architectures": ["LlamaForTokenClassification"]}, False),
    ],
)
def test_whether_a_head_of_unknown_name_may_be_tied(tmp_path, stored, config, expected):
    names = ["a.embed_tokens.weight", "b.embed_tokens.weight", *stored]
    found = checkpoint(tmp_path, names, **config)
    assert may_be_tied_to(found, "a.embed_tokens") is expected
    assert not may_be_tied_to(found, "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, True),  # the model needs a head, and Gemma's config does not say that it is tied
        ({"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False}, True),
        ({"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}, True),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["Qwen3Model"], "tie_word_embeddings": True}, False),
        ({"architectures": ["Qwen3ForSequenceClassification"], "tie_word_embeddings": True}, False),
    ],
)
def test_a_head_that_is_not_stored(tmp_path, config, tied):
    found = checkpoint(tmp_path, ["model.embed_tokens.weight"], **config)
    assert is_tied(found, find_vocabulary(found)) is tied


def test_a_head_that_is_stored_is_tied_if_it_is_equal_and_the_config_says_so(tmp_path):
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    for number, tie in enumerate((True, False)):
        found = checkpoint(tmp_path / str(number), names, tie_word_embeddings=tie)
        assert is_tied(found, find_vocabulary(found)) is tie
    packed = checkpoint(tmp_path / "packed", names[:1], ["lm_head"], tie_word_embeddings=True)
    assert not is_tied(packed, find_vocabulary(packed))


def test_untying_changes_every_place_that_says_it():
    config = {
        "tie_word_embeddings": True,
        "text_config": {"vocab_size": 8},
        "vision_config": {"depth": 2},
        "decoder": {"tie_word_embeddings": True},
    }
    result = untied(config)
    assert ties_of(config) == {True}
    assert ties_of(result) == {False}
    assert result["text_config"] == {"vocab_size": 8, "tie_word_embeddings": False}
    assert result["vision_config"] == {"depth": 2}
