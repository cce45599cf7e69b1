"""Layouts of folders: other weights, stale indexes, adapters beside the model."""

import json
import shutil

import pytest
import torch

from support.conversion import convert, refusal, run
from support.layouts import (
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


def test_an_adapter_in_the_place_of_the_model(llama, tmp_path):
    """unsloth#1191: the folder given as a model holds an adapter alone."""
    folder, _ = adapter(tmp_path / "lora", SHAPES)
    said = refusal("unpack", folder, tmp_path / "dense")
    assert "config.json is not there: the folder holds an adapter" in said
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", llama[1])
    assert "adapter_config.json is not there: the folder holds a model" in said


def test_an_index_entry_without_a_tensor(tmp_path):
    """torchtitan#3764: a tied head that the index lists becomes an entry of no dtype."""
    source = Model().llama(head=None).save(tmp_path / "source", quantization())
    file = source / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["lm_head.weight"] = {"dtype": "", "shape": [], "data_offsets": [0, 0]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    said = refusal("unpack", source, tmp_path / "dense")
    assert "lm_head.weight" in said
    assert "dtype" in said


def test_files_of_tensor_parallel_ranks(tmp_path):
    """vllm#4690, sglang#3209: sharded state, one file for each rank and no index."""
    source = Model().llama().save(tmp_path / "source", quantization())
    (source / "model.safetensors").rename(source / "model-rank-0-part-0.safetensors")
    said = refusal("unpack", source, tmp_path / "dense")
    assert "has neither model.safetensors nor model.safetensors.index.json" in said


def test_a_model_saved_with_its_adapter(tmp_path):
    """verl#4704, instructlab/training#141: base_layer and lora_A in one state dict."""
    model = Model().llama()
    name = "model.layers.0.self_attn.q_proj"
    model.stored = {
        key.replace(f"{name}.", f"{name}.base_layer."): tensor
        for key, tensor in model.stored.items()
    }
    pairs = pairs_of({name: (64, 64)})
    model.stored |= lora_tensors(pairs, "{}.lora_{}.default.weight")
    source = model.save(tmp_path / "source", quantization())
    said = refusal("unpack", source, tmp_path / "dense")
    assert f"{name}.base_layer.weight_" in said
    assert "of a model that was saved with PEFT's layers around its own" in said


def test_consolidated_weights_beside_the_shards(tmp_path):
    """vllm#40765, llama.cpp#17286: the same model twice, the second time in Mistral's names."""
    model = Model().llama()
    source = model.save(tmp_path / "source", quantization(), shards=2)
    tensors = {"layers.0.attention.wq.weight": torch.zeros(64, 64)}
    write_tensors(source / "consolidated.safetensors", tensors)
    said = refusal("unpack", source, tmp_path / "dense")
    assert "layers.0.attention.wq.weight" in said
    assert "--unlisted" in said
    assert run("verify", source).exit_code == 2
    convert("unpack", source, tmp_path / "dense", "--unlisted", "leave")
    assert_tensors(tmp_path / "dense", model.dense)


def test_a_draft_head_in_a_file_of_its_own(tmp_path):
    """compressed-tensors#788: MTP tensors saved beside the model; no index lists them."""
    model = Model().llama()
    source = model.save(tmp_path / "source", quantization())
    model.plain("mtp.fc.weight", 64, 128)
    draft = {"mtp.fc.weight": model.dense["mtp.fc.weight"]}
    write_tensors(source / "model_mtp.safetensors", draft)
    assert "mtp.fc.weight" in refusal("unpack", source, tmp_path / "dense")
    convert("unpack", source, tmp_path / "dense", "--unlisted", "take")
    assert_tensors(tmp_path / "dense", model.dense)


def test_a_stray_file_beside_the_shards(tmp_path):
    """mlx-vlm#1464: model.safetensors with other values, and shards with an index."""
    model = Model().llama()
    source = model.save(tmp_path / "source", quantization(), shards=2)
    write_tensors(source / "model.safetensors", model.stored)
    said = refusal("unpack", source, tmp_path / "dense")
    assert "more tensors too, and is not read beside model.safetensors" in said
    assert "they cannot be taken" in said
    convert("unpack", source, tmp_path / "dense", "--unlisted", "leave")
    assert_tensors(tmp_path / "dense", model.dense)


def test_new_embeddings_beside_an_adapter(llama, tmp_path):
    """mergekit#328: rows of added tokens, which vLLM alone read, in new_embeddings.safetensors."""
    folder, _ = adapter(tmp_path / "lora", SHAPES)
    rows = {"input_embeddings": torch.ones(4, 64), "output_embeddings": torch.ones(4, 64)}
    write_tensors(folder / "new_embeddings.safetensors", rows)
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert "new_embeddings.safetensors" in said
    assert "added tokens" in said


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "non_lora_state_dict.bin"])
def test_other_trained_weights_beside_an_adapter(name, llama, tmp_path):
    """Qwen-VL-Series-Finetune#259: trainers save what is no LoRA in a file of their own."""
    folder, _ = adapter(tmp_path / "lora", SHAPES)
    (folder / name).write_bytes(b"pickle")
    said = refusal("merge", llama[1], tmp_path / "merged", "--adapter", folder)
    assert name in said
