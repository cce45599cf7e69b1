"""``int4-lora train``, the page of fine-tuning, and the example with TRL."""

import errno
import json
import os
import re
import runpy
import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from int4_lora.integration.cli.app import app
from int4_lora.integration.demo.tokenizer import save_tokenizer
from support.tiny import SQUARE, make_tiny

ROOT = Path(__file__).parents[3]
SHORT = ["--steps=3", "--length=32", "--rank=4", "--eval-split=0.2", "--eval-every=2"]
SHORT.append("--device=cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a tiny INT4 model with a tokenizer."""
    folder = make_tiny(tmp_path_factory.mktemp("train") / "model", "g128", SQUARE)
    save_tokenizer(folder, length=256)
    return folder


@pytest.fixture
def desk(made, tmp_path, monkeypatch):
    """Make a folder with a model and data the working directory."""
    (tmp_path / "model").symlink_to(made)
    shutil.copy(ROOT / "docs" / "fine-tuning.md", tmp_path / "notes.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(part) for part in arguments])


def test_json_is_the_report(desk):
    result = invoke("train", "model", "notes.txt", "--output=adapter", *SHORT, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    report = json.loads((desk / "adapter" / "training.json").read_text())
    assert printed["output"] == "adapter"
    assert printed["seconds"] > 0
    assert {key: printed[key] for key in report} == report
    assert report["settings"]["dtype"] == "bfloat16"
    rows = report["data"]["rows"] + report["data"]["evaluation_rows"]
    cut = f"notes.txt: 1 document is longer than 32 tokens and was cut into {rows} rows\n"
    assert cut in result.stderr
    assert "step" not in result.stderr


def test_where_there_is_no_terminal_lines_tell_the_losses(desk):
    result = invoke("train", "model", "notes.txt", "--output=adapter", *SHORT)
    assert result.exit_code == 0, result.output
    report = json.loads((desk / "adapter" / "training.json").read_text())
    for entry in report["losses"]:
        assert f"step {entry['step']} of 3: loss {entry['loss']:.4f}\n" in result.stderr
    for entry in report["evaluations"]:
        assert f"step {entry['step']} of 3: evaluated loss {entry['loss']:.4f}" in result.stderr
    assert [entry["step"] for entry in report["evaluations"]] == [0, 2, 3]  # the first, the last
    assert "adapter: rank 4, alpha 8, on down_proj, gate_proj" in result.stdout
    (before, _, after), data = (one["loss"] for one in report["evaluations"]), report["data"]
    assert (
        f"; evaluated {before:.4f} before, {after:.4f} after\ntrained on {data['rows']} rows "
        f"({data['tokens']} tokens), evaluated on {data['evaluation_rows']}; "
    ) in result.stdout
    again = invoke("train", "model", "notes.txt", "--output=adapter", *SHORT)
    assert again.exit_code == 2
    assert "adapter is there: --force replaces it" in again.stderr
    assert again.stdout == ""


def test_without_an_evaluation_split_nothing_is_evaluated(desk):
    options = ["--steps=1", "--length=32", "--rank=4", "--device=cpu"]
    result = invoke("train", "model", "notes.txt", "--output=adapter", *options)
    assert result.exit_code == 0, result.output
    report = json.loads((desk / "adapter" / "training.json").read_text())
    assert report["evaluations"] == []
    assert report["versions"]["compressed-tensors"] == version("compressed-tensors")
    assert "evaluated" not in result.output
    assert f"\ntrained on {report['data']['rows']} rows (" in result.stdout


def test_the_page_names_what_the_adapters_folder_holds_and_the_help_says_the_same(desk):
    page = (ROOT / "docs" / "commands" / "train.md").read_text()
    plot = ["--plot"] if find_spec("matplotlib") is not None else []
    result = invoke("train", "model", "notes.txt", "--output=adapter", *SHORT, *plot)
    assert result.exit_code == 0, result.output
    table = page.partition("## ADAPTER")[2].partition("## Resuming")[0]
    for path in (desk / "adapter").iterdir():
        assert f"`{path.name}`" in table, path.name
    text = " ".join(invoke("train", "--help").output.replace("│", " ").split())
    for said in (
        "The scaling is alpha / rank",
        "and of the evaluation split",
        "once the new one is whole",
        "Print a JSON object instead of text",
    ):
        assert said in text


def test_a_loss_that_is_not_finite_ends_with_exit_code_1(desk):
    options = ["--learning-rate=1e37", "--save-every=1", "--steps=3", "--length=32"]
    result = invoke("train", "model", "notes.txt", "--output=adapter", *options)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("int4-lora: ")]
    assert "in step 2; the last good checkpoint is adapter.partial/checkpoint-1" in line
    assert sorted(path.name for path in desk.iterdir()) == ["adapter.partial", "model", "notes.txt"]


def test_a_full_disk_ends_with_exit_code_2_and_a_line(desk, monkeypatch):
    def no_space(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("int4_lora.atomic_files.os.fsync", no_space)
    result = invoke("train", "model", "notes.txt", "--output=adapter", *SHORT)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("int4-lora: ")]
    assert "adapter.partial cannot be written: [Errno 28] No space left on device" in line
    assert sorted(path.name for path in desk.iterdir()) == ["model", "notes.txt"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--learning-rate=-1", "learning_rate must be a finite number above 0, got -1"),
        ("--alpha=nan", "alpha must be a finite number above 0, got nan"),
        ("--eval-split=1", r"eval_split must be in \[0, 1\), got 1"),
        ("--targets=q_proj,", r"targets must be names of modules, got \['q_proj', ''\]"),
        ("--seed=4294967296", r"seed must be below 2\^32"),
        ("--rank=1000000000000", "rank must be at most 256, .* got 1000000000000"),
        ("--targets=q_proj,v_prj", "the model has no module named v_prj"),
        ("--output=/", "the output must be a folder that can be made, got /"),
        ("--length=257", "length must be at most 256, the max_position_embeddings of model"),
    ],
)
def test_a_setting_out_of_range_is_named(desk, option, message):
    result = invoke("train", "model", "notes.txt", "--output=adapter", option)
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert sorted(path.name for path in desk.iterdir()) == ["model", "notes.txt"]


def test_the_page_of_fine_tuning_runs(desk):
    page = (ROOT / "docs" / "fine-tuning.md").read_text()
    lines = re.findall(r"^\$ int4-lora (.*)$", page, flags=re.M)
    assert [line.split()[0] for line in lines] == ["train", "inspect", "merge", "merge"]
    for line in lines:
        if find_spec("matplotlib") is None:
            line = line.removesuffix(" --plot")
        result = invoke(*line.split())
        assert result.exit_code == 0, result.output
    report = json.loads((desk / "notes-lora" / "training.json").read_text())
    assert report["evaluations"][-1]["loss"] < 0.98 * report["losses"][0]["loss"]
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, {})
    names = {"model", "notes.txt", "notes-lora", "merged", "merged-w4a16", "python-lora"}
    assert {path.name for path in desk.iterdir()} == names


@pytest.mark.skipif(not find_spec("trl"), reason="TRL is not installed")
@pytest.mark.filterwarnings("ignore")  # of a data loader without a GPU, and TRL's of transformers
def test_the_example_with_trl_runs(desk, monkeypatch):
    texts = ["the quick brown fox " * (1 + number % 5) for number in range(12)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (desk / "data.jsonl").write_text(lines)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(desk / "datasets"))
    program = ROOT / "examples" / "finetune_int4.py"
    assert len(program.read_text().splitlines()) <= 40
    monkeypatch.setattr(sys, "argv", [str(program), "model", "data.jsonl", "sft-lora"])
    runpy.run_path(str(program), run_name="__main__")
    result = invoke("inspect", "model", "--adapter", "sft-lora", "--json")
    assert result.exit_code == 0, result.output
    (adapter,) = json.loads(result.stdout)["adapters"]
    assert adapter["ranks"] == [16]
    assert not (desk / "sft-lora.partial").exists()
