"""int4-lora annotate: what it writes, what it leaves alone, and when it writes nothing."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from int4_lora.integration import annotate, open_checkpoint
from int4_lora.integration.annotation.write import preview_annotation
from int4_lora.integration.cli.app import app
from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata, read_metadata
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, weights
from support.tiny import LLAMA, VARIANTS

pytestmark = pytest.mark.versions

ALL = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
WRITTEN = ("config.json", "lora_metadata.json")
INSERTED = ["lora_compatible", "lora_target_modules", "suggested_lora_targets"]


def run(*arguments):
    return CliRunner().invoke(app, ["annotate", *(str(one) for one in arguments)])


def state(folder):
    """Return what tells every file from itself after a change."""
    return {
        file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in folder.iterdir()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models[variant], tmp_path / "copied")
    old, before = state(folder), json.loads((folder / "config.json").read_text())
    found = annotate(folder)
    # the order of each module of "actorder-g128" is its own; vLLM merges q_proj, k_proj and v_proj
    assert found.lora_compatible == (variant != "actorder-g128")
    assert found.lora_target_modules == found.suggested_lora_targets == ALL
    assert (found.modules, sorted(found.changed)) == (14, sorted(WRITTEN))
    config = json.loads((folder / "config.json").read_text())
    said = {
        "lora_compatible": found.lora_compatible,
        "lora_target_modules": list(found.lora_target_modules),
        "suggested_lora_targets": list(found.suggested_lora_targets),
    }
    assert config == {**before, **said}
    assert list(config)[-3:] == list(said)
    beside = json.loads((folder / "lora_metadata.json").read_text())
    assert {key: beside[key] for key in said} == said
    read = LoRAMetadata(found.lora_compatible, found.lora_target_modules)
    assert read_metadata(config, folder) == read
    assert read_metadata({}, folder) == read_metadata(config) == read
    new = state(folder)
    assert {name for name in new if new[name] != old.get(name)} == {*WRITTEN}
    again = annotate(folder)
    assert again.changed == ()
    assert state(folder) == new  # not even a time


def test_peft_finds_the_int4_modules_by_what_is_suggested(copied_model):
    import peft
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    suggested = list(annotate(copied_model).suggested_lora_targets)
    found = peft.get_peft_model(model, peft.LoraConfig(target_modules=suggested))
    assert sorted(found.targeted_module_names) == sorted(open_checkpoint(copied_model).modules())


NUMBERS = {
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000.0,
    "tiny": 5e-324,
    "negative_zero": -0.0,
    "third": 0.1 + 0.2,
    "seed": 2**64 + 1,
    "window": [None, True, float("inf"), -3],
    "nested": {"b": 1, "a": {"ü": '\ud800 \u2028 \\ "'}},
}


@pytest.mark.parametrize("style", [{"indent": 4}, {"separators": (",", ":")}])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_other_value_and_the_order_of_the_keys_stay(copied_model, style, ending):
    file = copied_model / "config.json"
    config = {"z": 1, **json.loads(file.read_text()), **NUMBERS, "name": "modèle/名 \U0001f600"}
    file.write_bytes((json.dumps(config, **style) + "\n").replace("\n", ending).encode())
    annotate(copied_model)
    new = json.loads(file.read_text())
    said = {name: new[name] for name in INSERTED}
    assert json.dumps(new) == json.dumps({**config, **said})  # values, their types, and the order
    written = file.read_bytes()
    assert written.startswith(b'{\n  "z": 1,\n')  # as transformers writes it
    assert annotate(copied_model).changed == ()
    assert file.read_bytes() == written


def test_a_config_that_says_it_already_keeps_its_layout(copied_model):
    annotate(copied_model)
    file = copied_model / "config.json"
    compact = json.dumps(json.loads(file.read_text()), separators=(",", ":"))
    file.write_text(compact)
    assert annotate(copied_model).changed == ()
    assert file.read_text() == compact


def test_values_that_stand_there_are_replaced_in_place(copied_model):
    def spoil(config, quantization):
        whole = dict(config)
        config.clear()
        config.update(lora_compatible=False, lora_target_modules=["x"], **whole)
        quantization.update(lora_compatible=1, lora_target_modules=["y"])

    edit_config(copied_model, spoil)
    file = copied_model / "config.json"
    old = json.loads(file.read_text())
    assert annotate(copied_model).changed == ("lora_metadata.json", "config.json")
    new = json.loads(file.read_text())
    assert list(new) == [*old, "suggested_lora_targets"]
    assert list(new["quantization_config"]) == list(old["quantization_config"])
    for part in (new, new["quantization_config"]):
        assert part["lora_compatible"] is True
        assert part["lora_target_modules"] == list(ALL)
    assert read_metadata(new, copied_model) == LoRAMetadata(True, ALL)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ('"a": 1, "a": 1', "the key 'a' must not be repeated"),
        ('"a": {"b": 1, "b": 2}', "the key 'b' must not be repeated"),
        ('"a": 1e400', "1e400 is too large for a float"),
        ('"a": [-1e400]', "-1e400 is too large for a float"),
    ],
)
def test_what_would_be_lost_is_refused(copied_model, member, message):
    file = copied_model / "config.json"
    file.write_text(f"{{{member}, {file.read_text().strip()[1:]}")
    old = state(copied_model)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}: {message}"):
        annotate(copied_model)
    assert state(copied_model) == old


def test_a_quantization_config_within_text_config(copied_model):
    def move(config, quantization):
        config["text_config"] = {"quantization_config": quantization, "lora_compatible": "kept"}
        del config["quantization_config"]

    edit_config(copied_model, move)
    before = json.loads((copied_model / "config.json").read_text())
    annotate(copied_model)
    config = json.loads((copied_model / "config.json").read_text())
    assert config["text_config"] == before["text_config"]
    assert read_metadata(config, copied_model) == LoRAMetadata(True, ALL)


def test_a_model_that_was_quantised_anew(copied_model):
    annotate(copied_model)
    edit_config(copied_model, weights(actorder="group"))
    edit_tensors(copied_model, weight_g_idx=lambda _: torch.arange(256, dtype=torch.int32) % 8)
    with pytest.raises(ValueError, match="weight_g_idx of a module"):  # the other modules have none
        annotate(copied_model)
    edit_config(copied_model, weights(actorder=None))
    found = annotate(copied_model)
    assert found.incompatible_because[0].startswith(f"{Q_PROJ} stores a weight_g_idx")
    config = json.loads((copied_model / "config.json").read_text())
    assert read_metadata(config, copied_model) == LoRAMetadata(False, ALL)


def test_the_command(copied_model):
    old = state(copied_model)
    dry = run(copied_model, "--dry-run")
    assert (dry.exit_code, state(copied_model)) == (0, old)
    assert "would write: lora_metadata.json, config.json" in dry.output
    assert preview_annotation(copied_model).changed == ("lora_metadata.json", "config.json")
    first = run(copied_model, "--json")
    assert first.exit_code == 0
    found = json.loads(first.stdout)
    assert (found["path"], found["modules"], found["dry_run"]) == (str(copied_model), 14, False)
    assert (found["lora_compatible"], found["suggested_lora_targets"]) == (True, list(ALL))
    assert found["changed"] == ["lora_metadata.json", "config.json"]
    again = run(copied_model)
    assert again.output.splitlines() == [
        "lora_compatible: true",
        f"lora_target_modules: {', '.join(ALL)}",
        f"suggested_lora_targets: {', '.join(ALL)}",
        "14 modules described",
        "wrote: nothing",
    ]
