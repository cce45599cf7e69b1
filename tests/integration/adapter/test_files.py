"""The files of an adapter's folder: one, shards with and without an index, and neither."""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import AdapterModule, read_adapter, write_adapter
from support.adapter_files import DOWN_PROJ, Q_PROJ, keyed, pairs, write_folder

FIRST, SECOND = (f"adapter_model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "adapter_model.safetensors.index.json"


@pytest.fixture
def shards():
    """Return the tensors of an adapter by the shard that they lie in."""
    tensors = keyed()
    keys = sorted(tensors)
    return {FIRST: {k: tensors[k] for k in keys[::2]}, SECOND: {k: tensors[k] for k in keys[1::2]}}


def write_index(folder, shards, **changes):
    weight_map = {key: file for file, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | changes}))


@pytest.fixture
def indexed(tmp_path, shards):
    folder = write_folder(tmp_path / "adapter", shards)
    write_index(folder, shards)
    return folder


def assert_whole(adapter):
    assert adapter.modules.keys() == {Q_PROJ, DOWN_PROJ}
    for name, (a, b) in pairs().items():
        assert torch.equal(adapter.modules[name].a, a)
        assert torch.equal(adapter.modules[name].b, b)


def test_shards_are_read_with_and_without_an_index(indexed):
    assert_whole(read_adapter(indexed))
    (indexed / INDEX).unlink()
    assert_whole(read_adapter(indexed))


def test_a_shard_that_is_missing_is_named(indexed):
    (indexed / SECOND).unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names {SECOND}, which is not there"):
        read_adapter(indexed)
    (indexed / INDEX).unlink()
    with pytest.raises(ValueError, match=r"must hold shards 1 to 2 of the adapter, got \[1\]"):
        read_adapter(indexed)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model-00003-of-00002.safetensors", r"shards 1 to 2 .*, got \[1, 2, 3\]"),
        ("adapter_model-1-of-00002.safetensors", r"shards 1 to 2 .*, got \[1, 1, 2\]"),
        ("adapter_model-00003-of-00003.safetensors", r"of several adapters: -of-00002.*-of-00003"),
    ],
)
def test_shards_without_an_index_must_be_numbered(indexed, name, message):
    (indexed / INDEX).unlink()
    save_file({"x": torch.ones(1)}, indexed / name)
    with pytest.raises(ValueError, match=message):
        read_adapter(indexed)


def test_a_key_that_the_index_does_not_list_is_refused(indexed, shards):
    key = next(iter(shards[SECOND]))
    remaining = {file: dict(tensors) for file, tensors in shards.items()}
    del remaining[SECOND][key]
    write_index(indexed, remaining)
    with pytest.raises(ValueError, match=rf"{key} is not listed, but lies in {SECOND} \(1 such"):
        read_adapter(indexed)
    write_index(indexed, {FIRST: shards[FIRST]})
    with pytest.raises(ValueError, match=rf"is not listed, but lies in {SECOND} \(2 such keys\)"):
        read_adapter(indexed)


def test_a_key_that_lies_in_another_shard_is_refused(indexed, shards):
    key = next(iter(shards[SECOND]))
    write_index(indexed, shards, **{key: FIRST})
    with pytest.raises(ValueError, match=f"{key} is said to be in {FIRST}, which does not hold"):
        read_adapter(indexed)
    write_index(indexed, shards, missing=FIRST)
    with pytest.raises(ValueError, match=f"missing is said to be in {FIRST}, which does not hold"):
        read_adapter(indexed)


def test_a_key_in_two_shards_is_refused(indexed, shards):
    key = next(iter(shards[SECOND]))
    save_file(shards[FIRST] | {key: shards[SECOND][key]}, indexed / FIRST)
    with pytest.raises(ValueError, match=f"{SECOND}: {key} lies in {FIRST}, too"):
        read_adapter(indexed)


@pytest.mark.parametrize("weight_map", [None, [], {"x": 1}, {"x": "../x"}, {"x": "y.safetensors"}])
def test_an_index_that_names_no_shards_is_refused(indexed, weight_map):
    (indexed / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="weight_map must map keys to files named like"):
        read_adapter(indexed)


def test_one_file_beside_shards_is_refused(indexed):
    save_file(keyed(), indexed / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"holds adapter_model.safetensors and {INDEX}, of which"):
        read_adapter(indexed)
    (indexed / INDEX).unlink()
    with pytest.raises(ValueError, match=rf"holds adapter_model.safetensors and {FIRST}, of which"):
        read_adapter(indexed)


@pytest.mark.parametrize("name", [INDEX, FIRST])
def test_links_that_leave_the_folder_are_refused(indexed, tmp_path, name):
    (indexed / name).rename(tmp_path / "elsewhere")
    (indexed / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link that leaves the folder"):
        read_adapter(indexed)


def test_a_name_on_the_hub_is_refused_with_the_command_that_downloads_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder with an adapter; if") as refused:
        read_adapter("someone/llama-lora")
    command = str(refused.value).rpartition("with ")[2]
    assert command == "hf download someone/llama-lora --local-dir FOLDER"
    with pytest.raises(FileNotFoundError, match=r"is not a folder with an adapter$"):
        read_adapter(tmp_path / "nowhere")


def test_an_adapter_of_mlx_is_refused_with_the_way_to_write_it_for_peft(tmp_path):
    folder = tmp_path / "mlx"
    folder.mkdir()
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for name, (a, b) in pairs().items():
        tensors |= {f"{name}.lora_a": a.T.contiguous(), f"{name}.lora_b": b.T.contiguous()}
    save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"mlx-lm.*write_adapter\(FOLDER, {module: AdapterModule"):
        read_adapter(folder)
    stored = load_file(folder / "adapters.safetensors")
    modules = {
        name: AdapterModule(stored[f"{name}.lora_a"].T, stored[f"{name}.lora_b"].T, 20.0)
        for name in pairs()
    }
    adapter = write_adapter(tmp_path / "peft", modules)
    assert_whole(adapter)
    assert {module.scaling for module in adapter.modules.values()} == {20.0}


def test_the_conversion_that_a_pickle_is_refused_with_works(tmp_path):
    folder = write_folder(tmp_path / "adapter", keyed())
    (folder / "adapter_model.safetensors").unlink()
    torch.save(keyed(), folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which can run code") as refused:
        read_adapter(folder)
    command = shlex.split(str(refused.value).rpartition("with: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=folder, check=True)
    assert_whole(read_adapter(folder))
