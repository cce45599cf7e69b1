"""spellings: one module's names in transformers' layouts, held against transformers' own table."""

import pytest

from int4_lora.integration.checkpoint.spellings import spellings

LAYER = "layers.3.mlp.experts.7.down_proj"
TEXT = {
    f"{prefix}{LAYER}"
    for model in ("language_model", "text_model")
    for prefix in (
        f"model.{model}.", f"{model}.model.", "model.", f"{model}.", "", f"model.{model}.model.",
    )
}  # fmt: skip


def test_a_layer_without_a_tower_has_all_names():
    assert spellings(f"model.{LAYER}")[0] == f"model.{LAYER}"
    assert set(spellings(f"model.{LAYER}")) == TEXT
    assert set(spellings(LAYER)) == TEXT


@pytest.mark.parametrize("name", sorted(TEXT))
def test_the_relation_goes_both_ways(name):
    found = spellings(name)
    assert found[0] == name
    assert len(set(found)) == len(found)
    for other in found:
        assert name in spellings(other)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head", {"lm_head", "language_model.lm_head", "text_model.lm_head",
                     "model.language_model.lm_head", "model.text_model.lm_head"}),
        ("language_model.lm_head.weight",
         {"lm_head.weight", "language_model.lm_head.weight",
          "model.language_model.lm_head.weight"}),
        ("visual.blocks.0.mlp.down_proj",
         {"visual.blocks.0.mlp.down_proj", "model.visual.blocks.0.mlp.down_proj"}),
        ("model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
         {f"{a}vision_tower.{b}encoder.layers.0.mlp.fc1"
          for a in ("", "model.") for b in ("", "vision_model.")}),
        ("multi_modal_projector.linear_1",
         {"multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"}),
    ],
)  # fmt: skip
def test_heads_and_other_towers(name, expected):
    assert spellings(name)[0] == name
    assert set(spellings(name)) == expected


def test_a_tower_is_never_taken_for_the_text_model():
    for name in ("visual.layers.0.attn", "vision_tower.layers.0.fc1", "model.visual.norm"):
        assert not any("language_model" in other for other in spellings(name))


RENAMED = [
    ("llava", "language_model.model.layers.0.mlp.up_proj.weight"),
    ("llava", "language_model.lm_head.weight"),
    ("llava", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
    ("llava", "multi_modal_projector.linear_1.weight"),
    ("LlavaModel", "language_model.model.layers.0.mlp.up_proj.weight"),
    ("kimi_k25", "language_model.model.layers.1.mlp.experts.0.up_proj.weight_packed"),
    ("kimi_k25", "language_model.lm_head.weight"),
    ("qwen2_audio", "language_model.model.norm.weight"),
    ("emu3", "text_model.model.layers.0.mlp.up_proj.weight"),
    ("emu3", "text_model.lm_head.weight"),
    ("Qwen2VLForConditionalGeneration", "model.layers.0.mlp.up_proj.weight"),
    ("Qwen2VLForConditionalGeneration", "visual.blocks.0.attn.qkv.weight"),
    ("Qwen2VLModel", "model.layers.0.mlp.up_proj.weight"),
    ("qwen3_5_text", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("hyperclovax_vision_v2", "model.language_model.model.layers.0.mlp.up_proj.weight"),
    ("hyperclovax_vision_v2", "model.language_model.lm_head.weight"),
]


@pytest.mark.versions
@pytest.mark.parametrize(("model", "name"), RENAMED)
def test_transformers_renames_to_one_of_the_spellings(model, name):
    """Names of files become names in memory by the table of transformers >= 5."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    from transformers.core_model_loading import WeightRenaming

    rules = mapping.get_checkpoint_conversion_mapping(model)
    if rules is None:
        pytest.skip(f"this transformers has no rules for {model}")
    renamed = name
    for rule in rules:
        if isinstance(rule, WeightRenaming):
            renamed, _ = rule.rename_source_key(renamed)
    assert renamed in spellings(name)
    assert name in spellings(renamed)
