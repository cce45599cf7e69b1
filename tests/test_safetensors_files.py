"""Files that are missing, damaged, lying or outside the folder."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

from int4_lora.integration import open_checkpoint
from support.checkpoints import shard


def test_files_that_are_not_there_or_not_readable(copied_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder with a checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    model = copied_model / "model.safetensors"
    whole = model.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        model.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors"):
            open_checkpoint(copied_model)
    model.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor"):
        open_checkpoint(copied_model)
    (copied_model / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        open_checkpoint(copied_model)
    (copied_model / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="the top level must be an object, got list"):
        open_checkpoint(copied_model)


def test_a_dense_checkpoint_is_refused(copied_model):
    save_file({"model.norm.weight": torch.ones(4)}, copied_model / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor named \*\.weight_packed"):
        open_checkpoint(copied_model)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_leaves_the_folder_is_refused(copied_model, name):
    index = shard(copied_model)
    shutil.copy(
        copied_model / "model-00001-of-00003.safetensors",
        copied_model.parent / "outside.safetensors",
    )
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a shard must be a file name in the folder"):
        open_checkpoint(copied_model)


def test_a_link_that_leaves_the_folder_is_refused(copied_model, tmp_path):
    model = copied_model / "model.safetensors"
    model.rename(tmp_path / "elsewhere.safetensors")
    model.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is a link that leaves the folder"):
        open_checkpoint(copied_model)
    model.unlink()
    (tmp_path / "elsewhere.safetensors").rename(model)
    index = shard(copied_model)
    part = copied_model / "model-00002-of-00003.safetensors"
    part.rename(tmp_path / "part.safetensors")
    part.symlink_to(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"00002-of-00003.* is a link that leaves"):
        open_checkpoint(copied_model)
    assert index.is_file()


def test_the_links_of_the_hubs_cache_may_be_followed(copied_model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in copied_model.iterdir():
        file.rename(blobs / file.stem)
        (snapshot / file.name).symlink_to(blobs / file.stem)
    assert len(open_checkpoint(snapshot).modules()) == 14


def test_an_index_that_lies_is_refused(copied_model):
    index = shard(copied_model)
    content = json.loads(index.read_text())
    first, second, *_ = sorted(set(content["weight_map"].values()))
    moved = next(name for name, file in content["weight_map"].items() if file == first)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: second}}))
    with pytest.raises(ValueError, match=f"{re.escape(moved)} is said to be in {second}"):
        open_checkpoint(copied_model)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: 3}}))
    with pytest.raises(ValueError, match="weight_map must map tensor names to file names"):
        open_checkpoint(copied_model)
    index.write_text(json.dumps(content))
    (copied_model / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {second}, which is not there"):
        open_checkpoint(copied_model)
