"""int4-lora demo: what it prints, and how it refuses what it cannot use."""

import dataclasses
import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import int4_lora
from int4_lora.integration.cli.app import app
from int4_lora.integration.demo import findings, models, recipe
from int4_lora.reference import int4_lora_linear
from support.checkpoints import edit_config, weights
from support.tiny import LLAMA


def test_the_table(run):
    result = run()
    assert result.exit_code == 0, result.output
    for text in ("base", "right: every rule holds", "quantised weights", "of error_bound"):
        assert text in result.output


def test_json_carries_all_of_it(run):
    found = json.loads(run("--json").stdout)
    names = {field.name for field in dataclasses.fields(findings.Comparison)}
    assert found.keys() == {"right", *names}
    assert found["rows"][0].keys() == {
        "right",
        "allowed",
        *(field.name for field in dataclasses.fields(findings.Row)),
    }


def test_without_a_model_one_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "LLAMA", LLAMA)
    command = ["demo", f"--cache={tmp_path}", "--tokens=4"]
    assert CliRunner().invoke(app, command).exit_code == 0
    (folder,) = tmp_path.iterdir()
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert CliRunner().invoke(app, command).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file != folder} == made


def test_a_run_that_was_stopped_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "make_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        recipe.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_may_have_any_name(run, tiny_adapters):
    result = run("--json", adapters={"v1.5": tiny_adapters["a"], "keys": tiny_adapters["b"]})
    assert [row["adapter"] for row in json.loads(result.stdout)["rows"]] == ["base", "v1.5", "keys"]
    assert result.exit_code == 0


def copy_without(folder, target, name, **config):
    copied = shutil.copytree(folder, target)
    tensors = load_file(copied / "model.safetensors")
    del tensors[name]
    save_file(tensors, copied / "model.safetensors")
    file = copied / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return copied


def test_a_tensor_that_the_model_needs_is_missed(run, tiny_models, tmp_path):
    copied = copy_without(tiny_models["g32"], tmp_path / "untied", "lm_head.weight")
    result = run(model=copied)
    assert result.exit_code == 2
    assert "lacks lm_head.weight, which the model has" in result.output
    tied = copy_without(
        tiny_models["g32"], tmp_path / "tied", "lm_head.weight", tie_word_embeddings=True
    )
    assert run(model=tied).exit_code == 0


def test_a_zero_point_against_the_config_is_refused_before_anything_runs(
    run, tiny_models, tmp_path
):
    copied = shutil.copytree(tiny_models["asym-g32"], tmp_path / "copied")
    edit_config(copied, weights(symmetric=True))
    result = run(model=copied)
    assert result.exit_code == 2
    assert "weight_zero_point is stored, but the config says symmetric" in result.output


def test_where_transformers_overflows_nothing_is_judged(run, tiny_models, tmp_path):
    copied = shutil.copytree(tiny_models["g32"], tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 1e6
    save_file(tensors, copied / "model.safetensors")
    result = run("--dtype=float16", model=copied)
    assert result.exit_code == 2
    assert "transformers + PEFT itself overflows in float16" in result.output


def test_nan_has_no_number_in_json(monkeypatch, run):
    def nan(*operands):
        return int4_lora_linear(*operands) * math.nan

    monkeypatch.setattr(models, "int4_lora_linear", nan)
    result = run("--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert found["rows"][0]["ours"] is None


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"int4-lora {int4_lora.__version__}\n")


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("is not a folder with a checkpoint", ["--model=nowhere"]),
        ("--adapter needs --model", ["--adapter=a=b"]),
        ("--adapter must be NAME=PATH, got 'a'", ["--model=.", "--adapter=a"]),
        ("--adapter must be NAME=PATH, got '=b'", ["--model=.", "--adapter==b"]),
        ("names must differ from each other and 'base': 'base'", ["--model=.", "--adapter=base=b"]),
        ("names must differ", ["--model=.", "--adapter=a=b", "--adapter=a=c"]),
        ("'--tokens'", ["--tokens=0"]),
        ("No such option", ["--nothing"]),
        ("'--seed'", ["--seed=99999999999999999999999"]),
        ("it has no effect with --model", ["--model=.", "--cache=."]),
    ],
)
def test_options_that_are_unusable(message, options):
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output


def test_files_that_do_not_fit(run, tiny_models, demo_files, tmp_path):
    cases = {
        "is not a folder with an adapter": run(adapters={"a": tmp_path / "nowhere"}),
        "the adapter is for a weight of [512, 512], the base has [256, 256]": run(
            adapters={"a": demo_files.adapters["a"]}
        ),
        "tokens must be in [1, 256], got 257": run("--tokens=257"),
    }
    copied = shutil.copytree(tiny_models["g32"], tmp_path / "copied")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "vocab_size": None}))
    cases["vocab_size must be a positive whole number, got None"] = run(model=copied)
    wider = {**config, "intermediate_size": 640}
    (copied / "config.json").write_text(json.dumps(wider))
    cases["640] for the model of config.json, got [256, 512]"] = run(model=copied)
    (copied / "config.json").write_text(json.dumps({**config, "hidden_size": "big"}))
    cases["config.json: transformers cannot build this model: "] = run(model=copied)
    (copied / "config.json").write_text(
        json.dumps({**config, "text_config": None, "vocab_size": 0})
    )
    cases["vocab_size must be a positive whole number, got 0"] = run(model=copied)
    quantization = {**config["quantization_config"], "kv_cache_scheme": {"num_bits": 8}}
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    cases["kv_cache_scheme is set: only weights may be quantised"] = run(model=copied)
    group = {**config["quantization_config"]["config_groups"]["group_0"]}
    group["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    quantization = {**config["quantization_config"], "config_groups": {"group_0": group}}
    (copied / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    cases["are quantised: only weights may be"] = run(model=copied)
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    cases["unheard-of"] = run(model=copied)
    (copied / "model.safetensors").write_bytes(b"nothing")
    cases["not a readable safetensors file"] = run(model=copied)
    for message, result in cases.items():
        assert result.exit_code == 2, message
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
