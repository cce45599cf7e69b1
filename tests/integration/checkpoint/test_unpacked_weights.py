"""Float weights that config.json calls quantised."""

import json

import pytest

from support.conversion import run
from support.layouts import LLAMA, Model, group, quantization

LAYER = "model.layers.0.mlp"


def notes(tmp_path, groups=None, ignore=(), head="lm_head"):
    """Return what ``inspect`` notes of a model with a packed layer and float weights."""
    model = Model()
    model.packed(f"{LAYER}.up_proj", 96, 64)
    for name in ("model.embed_tokens", f"{LAYER}.gate", head):
        model.plain(f"{name}.weight", 48, 64)
    model.plain("model.norm.weight", 64)
    source = model.save(tmp_path / "source", quantization(groups, ignore=list(ignore)))
    result = run("inspect", source, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)["notes"]


@pytest.mark.parametrize(
    ("targets", "ignore", "named"),
    [
        (["Linear"], [], f"lm_head, {LAYER}.gate"),
        (["Linear"], ["re:.*mlp.gate$"], "lm_head"),
        (["Linear"], ["lm_head", f"{LAYER}.gate"], None),
        (["Linear", "Embedding"], ["re:.*gate", "lm_head"], "model.embed_tokens"),
        (["re:.*(up_proj|lm_head)"], [], "lm_head"),
        (["re:.*up_proj"], [], None),
    ],
)
def test_floats_that_config_json_targets_are_named(tmp_path, targets, ignore, named):
    said = notes(tmp_path, {"group_0": group(targets)}, ignore)
    assert len(said) == (named is not None)
    if named is not None:
        assert said[0].startswith(
            f"float weights that config.json targets and ignore does not name: {named}. "
        )


def test_a_group_that_stores_floats_is_no_contradiction(tmp_path):
    plain = {**group(["lm_head"]), "format": "dense"}
    said = notes(tmp_path, {"group_0": group(["re:.*up_proj"]), "group_1": plain})
    assert said == []


def test_the_name_in_ignore_may_be_that_of_another_layout(tmp_path):
    ignore = ["lm_head", "re:.*gate"]
    assert notes(tmp_path, ignore=ignore, head="language_model.lm_head") == []


def test_the_text_output_has_the_note(tmp_path):
    model = Model().llama(layers=1)
    source = model.save(tmp_path / "source", quantization(ignore=[]))
    assert "starts it at random: add it to ignore" in " ".join(
        run("inspect", source).output.split()
    )


def test_transformers_starts_such_a_head_at_random(tmp_path):
    from transformers import AutoModelForCausalLM

    model = Model().llama(layers=1)
    config = {**LLAMA, "num_hidden_layers": 1}
    source = model.save(tmp_path / "source", quantization(ignore=[]), config)
    _, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    assert "lm_head.weight_packed" in report["missing_keys"]
    assert "lm_head.weight" in report["unexpected_keys"]
