"""Files that are missing, damaged, lying or outside the folder."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.safetensors_files import read_tensor
from int4_lora.integration.checkpoint.safetensors_header import read_headers
from support.checkpoints import shard

pytestmark = pytest.mark.versions


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


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"]
)
def test_links_of_every_kind_are_followed_within_the_folder_only(copied_model, tmp_path, name):
    shard(copied_model)
    file = copied_model / name
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{re.escape(name)} is a link that leaves the folder"):
        open_checkpoint(copied_model)
    file.unlink()
    file.symlink_to(file)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(name)):
        open_checkpoint(copied_model)


def test_a_link_put_in_place_after_opening_is_not_followed(copied_model, tmp_path):
    checkpoint = open_checkpoint(copied_model)
    model = copied_model / "model.safetensors"
    model.rename(tmp_path / "elsewhere.safetensors")
    model.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="is a link that leaves the folder"):
        checkpoint.packed_weight(checkpoint.modules()[0])


def test_only_the_blobs_of_the_hubs_cache_are_beside_a_snapshot(copied_model, tmp_path):
    snapshot = tmp_path / "cache" / "models--a--b" / "snapshots" / "1"
    snapshot.parent.mkdir(parents=True)
    copied_model.rename(snapshot)
    other = tmp_path / "cache" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    model = snapshot / "model.safetensors"
    model.rename(other / "x")
    model.symlink_to(other / "x")
    with pytest.raises(ValueError, match="is a link that leaves the folder"):
        open_checkpoint(snapshot)


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
    said = f"{re.escape(moved)} is said to be in {second}, which does not hold it; {first} holds it"
    with pytest.raises(ValueError, match=said):
        open_checkpoint(copied_model)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: 3}}))
    with pytest.raises(ValueError, match="weight_map must map tensor names to file names"):
        open_checkpoint(copied_model)
    index.write_text(json.dumps(content))
    (copied_model / second).unlink()
    with pytest.raises(FileNotFoundError, match=f"names {second}, which is not there"):
        open_checkpoint(copied_model)


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
         torch.float8_e5m2, torch.float8_e8m0fnu, torch.int64, torch.int32, torch.int16,
         torch.int8, torch.uint8, torch.bool]  # fmt: skip


def test_every_dtype_and_shape_is_read_as_the_library_reads_it(tmp_path):
    torch.manual_seed(0)
    shapes = [(), (0,), (3, 0), (1,), (5, 7)]
    written = {
        f"{dtype}{shape}": torch.randint(0, 2, shape).to(dtype)
        for dtype in TYPES
        for shape in shapes
    }
    save_file(written, tmp_path / "all.safetensors")
    headers = read_headers(tmp_path / "all.safetensors")
    library = load_file(tmp_path / "all.safetensors")
    assert sorted(headers) == sorted(library) == sorted(written)
    for name, tensor in library.items():
        found = read_tensor(headers[name], name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.reshape(-1).view(torch.uint8).tolist() == (
            tensor.reshape(-1).view(torch.uint8).tolist()
        )


def test_a_dtype_that_torch_lacks_is_refused(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.uint16)}, tmp_path / "x.safetensors")
    stored = read_headers(tmp_path / "x.safetensors")["x"]
    with pytest.raises(ValueError, match=r"x\.safetensors: x: torch cannot hold the dtype U16"):
        read_tensor(stored, "x")


@pytest.mark.parametrize(
    "after",
    [b"", b"\xff" * 9, {"y": torch.ones(3)}, {"x": torch.ones(4)}, {"x": torch.ones(3).half()}],
)
def test_a_file_that_changed_since_it_was_opened_is_refused(tmp_path, after):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(3)}, file)
    stored = read_headers(file)["x"]
    if isinstance(after, bytes):
        file.write_bytes(after)
    else:
        save_file(after, file)
    with pytest.raises(ValueError, match=r"x\.safetensors: x: the file changed since"):
        read_tensor(stored, "x")


def test_a_file_that_became_shorter_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(3)}, file)
    stored = read_headers(file)["x"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="x: the file changed since it was opened"):
        read_tensor(stored, "x")
