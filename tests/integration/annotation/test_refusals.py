"""int4-lora annotate where it may not write, or is killed: files are the old or the new ones."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from int4_lora.integration import annotate
from int4_lora.integration.annotation import write as annotation
from int4_lora.integration.cli.app import app
from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata, read_metadata
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, weights

WRITTEN = ("lora_metadata.json", "config.json")  # in this order


def run(*arguments):
    return CliRunner().invoke(app, ["annotate", *(str(one) for one in arguments)])


def state(folder):
    """Return a hash of every file, and where each link leads."""
    return {
        file.name: os.readlink(file)
        if file.is_symlink()
        else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
    }


def refused(folder, *messages):
    """Check that a folder is refused in one line and left as it was."""
    old = state(folder)
    for options in ([], ["--dry-run"]):
        result = run(folder, *options)
        assert result.exit_code == 2, result.output
        assert result.output.count("\n") == 1
        assert all(message in result.output for message in messages), result.output
        assert state(folder) == old


@pytest.mark.parametrize(
    ("messages", "spoil"),
    [
        (["packed must be", "[256, 31]"], {"weight_packed": lambda packed: packed[:, 1:]}),
        (["scale must be", "[255, 8]"], {"weight_scale": lambda scale: scale[1:]}),
        (["scale must be float16", "float64"], {"weight_scale": lambda scale: scale.double()}),
        (["zero_point must be", "[32, 7]"], {"weight_zero_point": lambda zero: zero[:, 1:]}),
        (["weight_scale of a quantised module is missing"], {"weight_scale": None}),
        (["weight_zero_point of an asymmetric"], {"weight_zero_point": None}),
        (
            ["g_idx must be in [-1, 8)", "got 8"],
            {"weight_g_idx": lambda _: torch.arange(256, dtype=torch.int32) // 32 + 1},
        ),
    ],
)
def test_a_module_that_contradicts_itself_is_refused(copied_model, messages, spoil):
    edit_tensors(copied_model, **spoil)
    refused(copied_model, Q_PROJ, "model.safetensors", *messages)


def test_a_checkpoint_that_cannot_be_read_is_refused(copied_model, tmp_path):
    missing = run(tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "is not a folder with a checkpoint" in missing.output
    assert run("made/tiny").exit_code == 2  # a name on the hub: its cache is shared
    config = copied_model / "config.json"
    kept = config.read_text()
    edit_config(copied_model, weights(group_size=64))
    refused(copied_model, "mlp.down_proj", "group_size must be in_features / groups", "got 64")
    for text, message in (
        ("{}", "quantization_config is missing"),
        (kept + "x", "not JSON"),
        ("\ufeff" + kept, "not JSON"),
        ("[]", "top level must be an object"),
    ):
        config.write_text(text, encoding="utf-8")
        refused(copied_model, "config.json", message)
    config.write_text(kept)
    data = (copied_model / "model.safetensors").read_bytes()
    (copied_model / "model.safetensors").write_bytes(data[:-1])
    refused(copied_model, "model.safetensors", "its tensors end at byte")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lora_compatible": true, "author": "me"}', "holds 'author', which would be lost"),
        ("[]", "must be an object, got list"),
        ("", "is not JSON"),
        ("\0", "is not JSON"),
    ],
)
def test_a_metadata_file_that_would_be_lost_is_refused(copied_model, text, message):
    (copied_model / "lora_metadata.json").write_text(text)
    refused(copied_model, "lora_metadata.json is there", message)


def test_the_backends_own_keys_may_be_written_over(copied_model):
    said = {"lora_compatible": True, "lora_target_modules": ["q_proj"]}
    (copied_model / "lora_metadata.json").write_text(json.dumps(said))
    assert annotate(copied_model).changed == WRITTEN


@pytest.fixture
def snapshot(copied_model, tmp_path):
    """Return a snapshot of the hub's cache: every file is a link to a blob that others share."""
    hub = tmp_path / "models--made--tiny"
    made = hub / "snapshots" / "0000"
    made.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for number, file in enumerate(sorted(copied_model.iterdir())):
        shutil.copy(file, hub / "blobs" / str(number))
        (made / file.name).symlink_to(f"../../blobs/{number}")
    return made


def test_the_hubs_cache_is_not_written_to(snapshot):
    blobs = snapshot.parents[1] / "blobs"
    before = state(blobs)
    refused(snapshot, "config.json must be a file, got a link to ../../blobs/", "cp -rL")
    assert state(blobs) == before
    copied = snapshot.parents[2] / "copy"
    subprocess.run(["cp", "-rL", snapshot, copied], check=True)
    assert annotate(copied).changed == WRITTEN
    assert state(blobs) == before


def test_weights_may_be_links(snapshot):
    """What is written is a file in the folder; what is only read may be the cache's."""
    config = snapshot / "config.json"
    data = config.read_bytes()
    config.unlink()
    config.write_bytes(data)
    blobs = state(snapshot.parents[1] / "blobs")
    assert annotate(snapshot).changed == WRITTEN
    assert state(snapshot.parents[1] / "blobs") == blobs


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("target", ["other.json", "../other.json", "nowhere.json"])
def test_links_are_refused(copied_model, name, target):
    other = copied_model / target
    if target != "nowhere.json":
        shutil.copy(copied_model / "config.json", other)
        kept = other.read_bytes()
    (copied_model / name).unlink(missing_ok=True)
    (copied_model / name).symlink_to(target)
    refused(copied_model, f"{name} must be a file, got a link to {target}")
    assert other.exists() == (target != "nowhere.json")
    assert target == "nowhere.json" or other.read_bytes() == kept


def test_a_folder_that_is_a_link_is_a_folder(copied_model, tmp_path):
    (tmp_path / "link").symlink_to(copied_model)
    assert annotate(tmp_path / "link").changed == WRITTEN
    assert (tmp_path / "link").is_symlink()


def test_a_file_that_cannot_be_written_is_named(copied_model, monkeypatch):
    def read_only(contents, like):
        raise PermissionError(13, "Permission denied", str(like))

    monkeypatch.setattr(annotation, "replace_files", read_only)
    result = run(copied_model)
    assert result.exit_code == 2
    assert "Permission denied" in result.output
    assert result.output.count("\n") == 1


KILLED = """
import os, pathlib, signal, sys
from int4_lora.integration import annotate
call, number = sys.argv[2], int(sys.argv[3])
home = {"fsync": os, "replace": pathlib.Path, "fchmod": os}[call]
right, calls = getattr(home, call), []
def killed(*arguments):
    calls.append(arguments)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*arguments)
setattr(home, call, killed)
annotate(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("call", "number", "renamed"),
    [("fchmod", 1, 0), ("fsync", 2, 0), ("replace", 1, 0), ("replace", 2, 1), ("fsync", 3, 2)],
)
def test_killed(copied_model, tmp_path, call, number, renamed):
    """Before the first file is whole, between the files, between the names, after both."""
    done = shutil.copytree(copied_model, tmp_path / "done")
    annotate(done)
    old, new = state(copied_model), state(done)
    command = [sys.executable, "-c", KILLED, copied_model, call, str(number)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    found = {name: one for name, one in state(copied_model).items() if not name.endswith(".tmp")}
    assert found == {**old, **{name: new[name] for name in WRITTEN[:renamed]}}
    config = json.loads((copied_model / "config.json").read_text())
    said = read_metadata(config, copied_model)
    assert said == (LoRAMetadata(True, said.target_modules) if renamed else LoRAMetadata())
    annotate(copied_model)
    assert {name: state(copied_model)[name] for name in new} == new
