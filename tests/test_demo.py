"""The main job: every variant agrees, planted faults are seen, unusable input is refused."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from typer.testing import CliRunner

from int4_lora.integration import cli
from int4_lora.integration.demo import comparison, findings, models, recipe
from int4_lora.reference import LoRAStack, int4_lora_linear
from support.tiny import LLAMA, VARIANTS


@pytest.fixture(scope="module")
def tiny_adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for name, settings in recipe.ADAPTERS.items():
        recipe.make_adapter(root / name, LLAMA, name, settings)
    return {name: root / name for name in recipe.ADAPTERS}


@pytest.fixture
def run(tiny_models, tiny_adapters):
    """Return a call of the command line on a tiny model and its adapters."""

    def call(*options, model=tiny_models["g32"], adapters=tiny_adapters):
        named = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
        return CliRunner().invoke(
            cli.app, ["demo", f"--model={model}", *named, "--tokens=8", *options]
        )

    return call


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_variant_agrees(tiny_models, tiny_adapters, variant, dtype):
    found = comparison.compare(tiny_models[variant], tiny_adapters, tokens=8, dtype=dtype)
    assert [row.adapter for row in found.rows] == ["base", "a", "b", "c"]
    assert found.right, found
    assert found.linears == 14
    # q, o; k, v; gate, up; down in each of two layers, four rows of 8 tokens, in two dtypes
    assert found.elements == 2 * 4 * 8 * 2 * (2 * 256 + 2 * 128 + 2 * 512 + 256)
    assert found.dense_bytes == 2 * 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256)
    assert found.dense_bytes / found.packed_bytes > (1.9 if variant == "w8-g128" else 3)
    # both ways of running err, and no row is another row
    assert all(row.ours > 0 and row.theirs > 0 for row in found.rows)
    assert len({row.ours for row in found.rows}) == 4


def scaled(lora, factor):
    return None if lora is None else LoRAStack(lora.a, lora.b, lora.scaling * factor)


FAULTS = {
    "scaling in float32": lambda x, w, lora, ids, bias: int4_lora_linear(
        x, w, scaled(lora, 1 + 2.0**-25), ids, bias
    ),
    "ids off by one": lambda x, w, lora, ids, bias: int4_lora_linear(
        x, w, lora, None if ids is None else (ids + 1) % 3, bias
    ),
    "base without its last column": lambda x, w, lora, ids, bias: int4_lora_linear(
        torch.cat([x[:, :-1], x[:, :1] * 0], dim=1), w, lora, ids, bias
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(run, monkeypatch, fault):
    monkeypatch.setattr(models, "int4_lora_linear", FAULTS[fault])
    result = run("--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["right"]) == (1, False)
    wrong = {row["adapter"] for row in found["rows"] if not row["right"]}
    assert wrong == ({"a", "b", "c"} if fault == "scaling in float32" else {"base", "a", "b", "c"})


def test_a_row_that_is_nan_is_wrong():
    row = findings.Row("base", 0.0, 1.0, 1.0, 0.0)
    assert row.right
    assert not dataclasses.replace(row, float64_error=math.nan).right
    assert not dataclasses.replace(row, ours=math.nan).right
    assert not dataclasses.replace(row, float64_error=1.1e-9).right
    assert not dataclasses.replace(row, ours=2.01).right


def test_inside_float64_nothing_is_rounded_to_float32():
    fine = torch.tensor([1 + 2.0**-40], dtype=torch.float64)
    with models.Float64Inside():
        results = [
            fine.float(),
            fine.to(torch.float32),
            fine.to(dtype=torch.float32),
            torch.softmax(torch.cat([fine, fine]), 0, dtype=torch.float32) * 2 * fine,
            torch.zeros(1, dtype=torch.float32) + fine,
        ]
    assert all(result.dtype == torch.float64 and (result == fine).all() for result in results)
    assert fine.float() != fine


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
        *(field.name for field in dataclasses.fields(findings.Row)),
    }


def test_without_a_model_one_is_made_once(tmp_path):
    command = ["demo", f"--cache={tmp_path}", "--tokens=4"]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    (folder,) = tmp_path.iterdir()
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file != folder} == made


def test_a_run_that_was_stopped_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "make_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        recipe.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


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
    ],
)
def test_options_that_are_unusable(message, options):
    result = CliRunner().invoke(cli.app, ["demo", *options])
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
    cases["size mismatch for model.layers.0.mlp"] = run(model=copied)
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    cases["unheard-of"] = run(model=copied)
    (copied / "model.safetensors").write_bytes(b"nothing")
    cases["not a readable safetensors file"] = run(model=copied)
    for message, result in cases.items():
        assert result.exit_code == 2, message
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
