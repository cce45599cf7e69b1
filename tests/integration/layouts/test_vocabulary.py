"""Layouts of embeddings and heads: packed, tied, resized."""

import pytest

from support.conversion import refusal, run
from support.layouts import (
    LLAMA,
    Model,
    adapter,
    assert_dense,
    assert_merged,
    group,
    quantization,
)

HEAD = {"lm_head": (48, 64)}


@pytest.mark.parametrize("target", ["Embedding", r"re:.*embed_tokens$"])
def test_a_packed_embedding_that_is_the_head_too(target, tmp_path):
    """vllm#45535: a tied model whose embedding is packed; nothing is stored for the head."""
    model = Model()
    model.packed("model.embed_tokens", 48, 64)
    model.packed("model.layers.0.self_attn.q_proj", 64, 64)
    groups = {"group_0": group(["Linear", target])}
    config = {**LLAMA, "tie_word_embeddings": True}
    source = model.save(tmp_path / "source", quantization(groups, ignore=[]), config)
    assert_dense(model, source, tmp_path / "dense")
    said = run("annotate", source, "--dry-run").stdout
    assert "model.embed_tokens is quantised, and vLLM serves only a vocabulary whose" in said
    folder, _ = adapter(tmp_path / "lora", HEAD)
    said = refusal("merge", source, tmp_path / "merged", "--adapter", folder)
    assert "lm_head" in said
    assert "tied to the embeddings" in said


def test_a_packed_head(tmp_path):
    """sglang#35358, vllm#37291: engines that take the head for dense read no packed weight."""
    model = Model().llama(head=None)
    model.packed("lm_head", 48, 64)
    source = model.save(tmp_path / "source", quantization(ignore=[]))
    assert_dense(model, source, tmp_path / "dense")
    said = run("annotate", source, "--dry-run").stdout
    assert "lora_compatible: true" in said  # with the flag, vLLM takes adapters beside it and on it
    folder, pairs = adapter(tmp_path / "lora", HEAD)
    assert_merged(model, pairs, source, folder, tmp_path / "merged")


def test_an_adapter_for_a_resized_vocabulary(llama, tmp_path):
    """LlamaFactory#2888: the adapter's head has 2 tokens more than the base."""
    folder, _ = adapter(tmp_path / "lora", {"lm_head": (50, 64)})
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert "lm_head: the adapter is for a vocabulary of 50 tokens, the base has 48" in said
