"""Targets of config groups that use the names in memory, and not those in the files."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.utils.match import match_targets

from int4_lora.integration.checkpoint.scheme import read_schemes
from int4_lora.integration.checkpoint.target_matching import ignored

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
LAYER = "layers.0.self_attn.q_proj"
PREFIXES = ["model.language_model.", "language_model.model.", "model.", "language_model.", ""]


def size_of(module, groups):
    """Return the group size of the group of a module; ``groups`` has its targets by size."""
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            f"g{size}": {"targets": targets, "weights": {**GROUP, "group_size": size}}
            for size, targets in groups.items()
        },
    }
    found = read_schemes(Path("config.json"), {"quantization_config": quantization}, [module])
    return found[module].group_size


@pytest.mark.versions
@pytest.mark.parametrize("memory", PREFIXES)
@pytest.mark.parametrize("files", PREFIXES)
@pytest.mark.parametrize("kind", ["exact", "pattern"])
def test_targets_may_use_the_names_in_memory(memory, files, kind):
    """Upstream matches the name in memory, and so do we, by whichever name the files have."""
    target = memory + LAYER if kind == "exact" else f"re:{memory}layers[.]0[.].*q_proj$"
    others = [f"re:{memory}layers[.]1[.].*", "Linear"]
    theirs = match_targets(memory + LAYER, torch.nn.Linear(1, 1), [target, *others])
    assert theirs[0] == target
    assert size_of(files + LAYER, {8: [target], 16: others}) == 8


def test_a_modules_own_name_comes_first():
    own, other = f"language_model.model.{LAYER}", f"model.language_model.{LAYER}"
    assert size_of(own, {8: [own], 16: [other]}) == 8
    assert size_of(other, {8: [own], 16: [other]}) == 16


def test_two_spellings_in_two_groups_are_refused():
    groups = {8: [f"model.language_model.{LAYER}"], 16: [f"model.{LAYER}"], 32: ["Linear"]}
    with pytest.raises(ValueError, match="its other spellings are in different groups") as refused:
        size_of(f"language_model.model.{LAYER}", groups)
    assert f"model.language_model.{LAYER} in g8" in str(refused.value)
    assert f"model.{LAYER} in g16" in str(refused.value)


def test_other_towers_are_not_the_text_model():
    groups = {8: ["re:model.language_model.*"], 16: ["re:model.visual.*"], 32: ["Linear"]}
    assert size_of("visual.blocks.0.mlp.down_proj", groups) == 16
    assert size_of("audio.layers.0.fc1", groups) == 32
    with pytest.raises(ValueError, match="no config group targets it"):
        size_of("visual.blocks.0.mlp.down_proj", {8: ["re:model.language_model.*"]})


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (None, []),
        (["lm_head"], ["language_model.lm_head"]),  # its name in memory since transformers 4.52
        (["re:.*mtp"], ["mtp.fc"]),
        (["mtp", "mtp.fc.linear"], []),
        (["MoEGate"], []),
        (["Linear"], ["language_model.lm_head", "mtp.fc"]),
    ],
)
def test_the_ignore_list(entries, expected):
    modules = ["language_model.lm_head", "mtp.fc"]
    assert ignored(Path("config.json"), {"ignore": entries}, modules) == expected


@pytest.mark.parametrize("entries", ["lm_head", [1], ["re:("]])
def test_an_ignore_list_that_cannot_be_read(entries):
    with pytest.raises(ValueError, match=r"config\.json: ignore"):
        ignored(Path("config.json"), {"ignore": entries}, ["a"])
