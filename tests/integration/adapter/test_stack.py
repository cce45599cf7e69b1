"""stack_adapters and check_fits where an adapter and the base differ in their names."""

import pytest

from int4_lora.integration import check_fits, open_checkpoint, read_adapter, stack_adapters
from support.bases import write_base, write_lora

Q_PROJ = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        (f"model.language_model.{Q_PROJ}", f"model.{Q_PROJ}"),
        (f"model.language_model.{Q_PROJ}", f"language_model.model.{Q_PROJ}"),
        (f"model.{Q_PROJ}", f"model.language_model.{Q_PROJ}"),
        (f"model.{Q_PROJ}", Q_PROJ),
        ("language_model.lm_head", "lm_head"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("model.layers.0.self_attn.qkv_proj", f"model.{Q_PROJ}"),
        (f"model.{Q_PROJ}", "model.layers.0.self_attn.qkv_proj"),
        ("model.language_model.layers.0.self_attn.qkv_proj", f"model.{Q_PROJ}"),
    ],
)
def test_the_same_layer_under_another_name_is_refused(tmp_path, name, trained):
    """vllm#48019: the layer would be computed without the adapter, and nothing would show it."""
    write_lora(tmp_path / "lora", {trained: (16, 32)})
    write_lora(tmp_path / "right", {name: (16, 32)})
    adapter = read_adapter(tmp_path / "lora")
    with pytest.raises(ValueError, match="in the adapter: use fit_adapter") as raised:
        stack_adapters([read_adapter(tmp_path / "right"), adapter], name, 32, 16)
    assert f"{tmp_path / 'lora'}: {name} is {trained} in the adapter" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        (f"model.decoder.{Q_PROJ}", f"model.encoder.{Q_PROJ}"),
        (f"encoder.{Q_PROJ}", f"decoder.{Q_PROJ}"),
        (f"model.{Q_PROJ}", f"vision_tower.encoder.{Q_PROJ}"),
        (f"model.language_model.{Q_PROJ}", f"model.vision_tower.{Q_PROJ}"),
        (f"model.{Q_PROJ}", f"audio_tower.{Q_PROJ}"),
        (f"model.{Q_PROJ}", "model.layers.1.self_attn.q_proj"),
        (f"model.{Q_PROJ}", "model.layers.0.cross_attn.q_proj"),
        (f"model.{Q_PROJ}", "model.layers.0.self_attn.v_proj"),
        ("model.layers.0.experts.1.up_proj", "model.layers.0.experts.2.up_proj"),
    ],
)
def test_another_layer_with_an_equal_ending_is_not_taken_for_it(tmp_path, name, trained):
    write_lora(tmp_path / "lora", {trained: (16, 32)})
    assert stack_adapters([read_adapter(tmp_path / "lora")], name, 32, 16) is None


def test_check_fits_says_the_change_of_prefix(tmp_path):
    write_base(tmp_path / "base", {f"model.language_model.{Q_PROJ}": (16, 32)})
    write_lora(tmp_path / "lora", {f"model.{Q_PROJ}": (16, 32)})
    write_lora(tmp_path / "right", {f"model.language_model.{Q_PROJ}": (16, 32)})
    checkpoint = open_checkpoint(tmp_path / "base")
    with pytest.raises(ValueError, match=r"--rename model\.=model\.language_model\."):
        check_fits(read_adapter(tmp_path / "lora"), checkpoint)
    check_fits(read_adapter(tmp_path / "right"), checkpoint)


def test_a_tied_head_is_not_computed_here(tmp_path):
    embeddings, shape = "model.embed_tokens", (16, 32)
    tied = {"dense": [embeddings], "tie_word_embeddings": True}
    write_base(tmp_path / "base", {f"model.{Q_PROJ}": shape, embeddings: shape}, **tied)
    write_lora(tmp_path / "lora", {"lm_head": shape})
    with pytest.raises(ValueError, match=r"lora: lm_head is not packed in INT4 in .*merge adds"):
        check_fits(read_adapter(tmp_path / "lora"), open_checkpoint(tmp_path / "base"))
