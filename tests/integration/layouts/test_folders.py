"""Layouts of folders: other weights, stale indexes, adapters beside the model."""

import json
import shutil

from support.conversion import convert, refusal, run
from support.public_layouts import (
    Model,
    adapter,
    assert_merged,
    assert_tensors,
    lora_config,
    lora_tensors,
    pairs_of,
    quantization,
    write_json,
    write_tensors,
)

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}
INDEX = "model.safetensors.index.json"


def test_an_index_of_other_shards(tmp_path):
    """CoSER#3: the index names the shards of an earlier save."""
    source = Model().llama().save(tmp_path / "source", quantization(), shards=2)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {
        name: file.replace("of-00002", "of-00004") for name, file in index["weight_map"].items()
    }
    write_json(source / INDEX, index)
    said = refusal("unpack", source, tmp_path / "dense")
    assert f"{INDEX} names model-00001-of-00004.safetensors, which is not there" in said


def test_an_adapter_beside_the_model(tmp_path):
    """transformers#43781: the adapter's files lie in the model's own folder."""
    model = Model().llama()
    source = model.save(tmp_path / "source", quantization(), shards=2)
    pairs = pairs_of(SHAPES)
    write_json(source / "adapter_config.json", lora_config(pairs))
    write_tensors(source / "adapter_model.safetensors", lora_tensors(pairs))
    assert run("verify", source).exit_code == 0
    convert("unpack", source, tmp_path / "dense")
    files = ("adapter_config.json", "adapter_model.safetensors")
    for file in files:
        assert (tmp_path / "dense" / file).read_bytes() == (source / file).read_bytes()
        (tmp_path / "dense" / file).unlink()
    assert_tensors(tmp_path / "dense", model.dense)
    assert_merged(model, pairs, source, source, tmp_path / "merged")
    assert not any((tmp_path / "merged" / file).exists() for file in files)


def test_an_adapter_in_a_folder_within(llama, tmp_path):
    """qlora#44: checkpoint-10/adapter_model/ holds the adapter, checkpoint-10 does not."""
    model, source = llama
    folder, pairs = adapter(tmp_path / "lora", SHAPES)
    (tmp_path / "checkpoint-10").mkdir()
    shutil.move(folder, tmp_path / "checkpoint-10" / "adapter_model")
    said = refusal("merge", source, tmp_path / "merged", "--adapter", tmp_path / "checkpoint-10")
    assert "adapter_config.json is not there, but in adapter_model there is one" in said
    folder = tmp_path / "checkpoint-10" / "adapter_model"
    assert_merged(model, pairs, source, folder, tmp_path / "merged")
