"""Which layers a config targets: as the installed PEFT does, whose versions count differently."""

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from int4_lora.integration.adapter.targeting import COUNTINGS, NEWEST, countings, is_targeted

NAMES = [
    f"{prefix}layers.{layer}.{part}"
    for prefix in ("", "model.", "model.language_model.")
    for layer in range(4)
    for part in (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.up_proj",
        "mlp.experts.0.up_proj",
        "mlp.experts.3.up_proj",
        "blocks.2.mlp.experts.1.up_proj",
    )
]
SETTINGS = [
    {"target_modules": ["q_proj"]},
    {"target_modules": r".*\.mlp\.(up|down)_proj"},
    {
        "target_modules": ["q_proj", "layers.1.mlp.up_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    {"target_modules": r".*_proj", "exclude_modules": r".*\.layers\.0\..*"},
    {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1, 3]},
    {"target_modules": ["up_proj"], "layers_to_transform": 0},
    {"target_modules": ["up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
    {"target_modules": ["up_proj"], "layers_to_transform": [1, 3], "layers_pattern": "experts"},
    {"target_modules": ["up_proj"], "layers_to_transform": [2], "layers_pattern": ["blocks"]},
    {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
    {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": []},
    {"target_modules": ["v_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": [0]},
    {"target_modules": ["proj"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["experts", "self_attn.q_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1", "proj"]},
    {"target_parameters": ["experts.up_proj"]},
    {"target_modules": ["q_proj"], "target_parameters": ["experts.up_proj"]},
]


@pytest.mark.versions
@pytest.mark.parametrize("settings", SETTINGS)
def test_targets_what_the_installed_peft_targets(settings):
    config = peft.LoraConfig(**settings)
    (counting,) = countings({"peft_version": peft.__version__})
    theirs = {name for name in NAMES if check_target_module_exists(config, name)}
    assert {name for name in NAMES if is_targeted(settings, name, counting)} == theirs


EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    ("version", "number"),
    [("0.18.1", 2), ("0.19.1", 2), ("0.20.0", 1), ("0.21.2", 1), ("0.22.0", 1), ("1.0.0", 1)],
)
def test_the_version_says_which_number_is_the_layers(version, number):
    (counting,) = countings({"peft_version": version})
    assert counting.number({}, EXPERT) == number


@pytest.mark.parametrize("version", [None, "0.20.1.dev0", "0.19.2.dev0@abc", "0.20rc1", ""])
def test_without_a_released_version_each_way_of_counting_is_possible(version):
    assert countings({"peft_version": version}) == COUNTINGS
    assert countings({}) == COUNTINGS


def test_a_group_in_the_pattern_is_what_older_versions_took_for_the_number():
    config = {"layers_pattern": r"(h|layers)"}
    assert [counting.number(config, EXPERT) for counting in COUNTINGS] == [1, None, None]
    config = {"layers_pattern": r"layers\.(\d+)\.mlp\.experts"}
    assert [counting.number(config, EXPERT) for counting in COUNTINGS] == [2, 1, 1]


def test_a_name_without_a_number_is_no_layer():
    config = {"target_modules": ["head"], "layers_to_transform": [0]}
    assert not is_targeted(config, "model.lm.head", NEWEST)
