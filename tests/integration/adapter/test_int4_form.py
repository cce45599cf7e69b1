"""Adapters in INT4: the tensors are compressed-tensors', and what contradicts is refused."""

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from int4_lora.integration import AdapterModule, read_adapter, write_adapter
from int4_lora.integration.adapter.int4_form import Int4Form, int4_tensors
from int4_lora.integration.checkpoint.compressed_tensors import (
    decompress_tensors,
    upstream_scheme,
)
from int4_lora.integration.checkpoint.scheme import Scheme
from int4_lora.integration.demo import recipe
from support.adapter_files import Q_PROJ, keyed, write_folder

pytestmark = pytest.mark.versions

KEY = "base_model.model.q_proj.lora_A.weight"
PARTS = ("packed", "scale", "shape")


def random_module(rank, columns, rows, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, columns, generator=generator).to(dtype)
    return AdapterModule(a, torch.randn(rows, rank, generator=generator).to(dtype), 2.0)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def spoil(folder, *, tensors=None, **record):
    """Write other tensors, and other values into the record of the config."""
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    config = config_of(folder)
    config["quantization_config"] |= record
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_the_words_and_the_config_by_hand(tmp_path):
    a = torch.tensor([[7.5, -3.0, 1.0, 0.0], [-15.0, 14.0, 2.0, -6.0]])
    b = torch.tensor([[0.75, -0.2], [0.0, 3.75], [7.5, 6.0]])
    write_adapter(tmp_path / "int4", {"q_proj": AdapterModule(a, b, 0.5)}, bits=4)
    tensors = tensors_of(tmp_path / "int4")
    assert sorted(tensors) == [
        f"base_model.model.q_proj.lora_{matrix}.weight_{part}" for matrix in "AB" for part in PARTS
    ]
    # codes 7, -3, 1, 0 and -8, 7, 1, -3, each plus 8; unused nibbles are zero
    assert tensors[f"{KEY}_packed"].tolist() == [[0x895F], [0x59F0]]
    assert tensors[f"{KEY}_scale"].tolist() == [[1.0], [2.0]]
    assert tensors[f"{KEY}_shape"].tolist() == [2, 4]
    key_b = KEY.replace("_A", "_B")
    # codes 7 (7.5 is clamped), -2; 0, 7; 7, 6
    assert tensors[f"{key_b}_packed"].tolist() == [[0x6F], [0xF8], [0xEF]]
    assert torch.equal(tensors[f"{key_b}_scale"], torch.tensor([[0.1], [0.5], [1.0]]))
    config = config_of(tmp_path / "int4")
    assert config["peft_type"] == "LORA_INT4"
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "num_bits": 4,
        "group_size": 128,
        "symmetric": True,
    }
    adapter = read_adapter(tmp_path / "int4")
    module = adapter.modules["q_proj"]
    assert module.a.tolist() == [[7.0, -3.0, 1.0, 0.0], [-16.0, 14.0, 2.0, -6.0]]
    assert module.scaling == 0.5
    assert adapter.notes == ("stored in INT4 (groups of 128, symmetric), read dequantised",)
    assert adapter.config["peft_type"] == "LORA"
    assert "quantization_config" not in adapter.config


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_read_is_what_compressed_tensors_decompresses(tmp_path, dtype, symmetric):
    modules = {
        "model.q_proj": random_module(16, 256, 20, dtype),
        "model.o_proj": random_module(192, 64, 33, dtype, seed=1),
    }
    folder = tmp_path / "int4"
    written = write_adapter(folder, modules, bits=4, group_size=64, symmetric=symmetric)
    tensors = tensors_of(folder)
    for name, module in written.modules.items():
        for matrix, ours in (("A", module.a), ("B", module.b)):
            key = f"base_model.model.{name}.lora_{matrix}.weight"
            stored = {
                name.removeprefix(key.removesuffix("weight")): tensor
                for name, tensor in tensors.items()
                if name.startswith(key)
            }
            size = 64 if ours.shape[1] > 64 else None
            strategy = "group" if size else "channel"
            scheme = Scheme("pack-quantized", "int", 4, symmetric, strategy, size, None, False)
            theirs = decompress_tensors(stored, upstream_scheme(scheme))
            assert ours.dtype == dtype
            assert torch.equal(ours, theirs)


def test_sixteen_ranks_are_three_and_a_half_times_smaller():
    module = random_module(16, 1024, 1024, torch.bfloat16)
    tensors = {"q_proj.lora_A.weight": module.a, "q_proj.lora_B.weight": module.b}
    stored = int4_tensors(tensors, Int4Form())
    sizes = [sum(tensor.nbytes for tensor in each.values()) for each in (tensors, stored)]
    assert sizes[0] / sizes[1] > 3.5


def test_embeddings_stay_floats(tmp_path):
    modules = {
        "model.embed_tokens": random_module(4, 32, 64),
        "model.q_proj": random_module(4, 8, 6),
    }
    written = write_adapter(tmp_path / "int4", modules, bits=4)
    embedding = written.modules["model.embed_tokens"]
    assert torch.equal(embedding.a, modules["model.embed_tokens"].a)
    assert torch.equal(embedding.b, modules["model.embed_tokens"].b)
    assert not torch.equal(written.modules["model.q_proj"].a, modules["model.q_proj"].a)


def test_an_adapters_name_within_the_key(tmp_path):
    plain = keyed("base_model.model.{module}.lora_{matrix}.sql.weight")
    write_folder(tmp_path / "named", int4_tensors(plain, Int4Form()))
    config = config_of(tmp_path / "named")
    record = {"quant_method": "compressed-tensors", "format": "pack-quantized", "num_bits": 4}
    config |= {
        "peft_type": "LORA_INT4",
        "quantization_config": {**record, "group_size": 128, "symmetric": True},
    }
    (tmp_path / "named" / "adapter_config.json").write_text(json.dumps(config))
    assert Q_PROJ in read_adapter(tmp_path / "named").modules


def test_peft_stops_and_misses_every_key(demo_files, tmp_path):
    """The type stops PEFT; without it, PEFT would warn, and add zero."""
    modules = read_adapter(demo_files.adapters["a"]).modules
    folder = tmp_path / "int4"
    write_adapter(folder, modules, bits=4, group_size=32)

    def base():
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**recipe.LLAMA))
        return model.to_empty(device="cpu")

    with pytest.raises((KeyError, ValueError), match="LORA_INT4"):
        peft.PeftModel.from_pretrained(base(), folder)
    config = config_of(folder)
    config["peft_type"] = "LORA"
    del config["quantization_config"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        peft.PeftModel.from_pretrained(base(), folder)
    with pytest.raises(ValueError, match="is of an adapter in INT4, whose config must say so"):
        read_adapter(folder)


def without(part):
    return lambda tensors: {key: value for key, value in tensors.items() if key != f"{KEY}_{part}"}


def replaced(part, tensor):
    return lambda tensors: {**tensors, f"{KEY}_{part}": tensor}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without("scale"), ValueError, "weight_scale is missing"),
        (without("shape"), ValueError, "weight_shape is missing"),
        (without("packed"), ValueError, "weight_packed is missing"),
        (
            replaced("zero_point", torch.zeros(1, 1, dtype=torch.int32)),
            ValueError,
            "weight_zero_point is no part of INT4 (groups of 128, symmetric)",
        ),
        (replaced("packed", torch.ones(2, 1)), TypeError, "packed must be int32, got float32"),
        (
            replaced("packed", torch.ones(2, 2, dtype=torch.int32)),
            ValueError,
            "at 4 bits = [2, 1], got [2, 2]",
        ),
        (replaced("scale", torch.ones(2, 2)), ValueError, "group_size must be"),
        (
            replaced("shape", torch.ones(2)),
            ValueError,
            "weight_shape must be int64 [2], got float32",
        ),
        (
            lambda tensors: {**tensors, KEY: torch.ones(2, 4)},
            ValueError,
            "is stored in floats and in INT4",
        ),
        (
            lambda tensors: {"q_proj.lora_A.weight": torch.ones(2, 4)},
            ValueError,
            "is of an adapter in floats, and its config says INT4 (groups of 128, symmetric)",
        ),
    ],
)
def test_tensors_that_contradict_are_refused_with_the_key(tmp_path, change, error, message):
    folder = tmp_path / "int4"
    write_adapter(folder, {"q_proj": random_module(2, 4, 3)}, bits=4)
    spoil(folder, tensors=change(tensors_of(folder)))
    with pytest.raises(error, match=re.escape(message)) as caught:
        read_adapter(folder)
    assert "lora_A.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"num_bits": 8}, "quantization_config.num_bits must be 4, got 8"),
        ({"format": "nvfp4-pack-quantized"}, "quantization_config.format must be 'pack-quantized'"),
        ({"quant_method": "awq"}, "quantization_config.quant_method must be 'compressed-tensors'"),
        ({"group_size": 0}, "quantization_config.group_size must be a positive int, got 0"),
        ({"group_size": True}, "quantization_config.group_size must be a positive int, got True"),
        ({"symmetric": 1}, "quantization_config.symmetric must be true or false, got 1"),
        ({"group_size": 2}, "group_size must be in_features / groups = 4 / 1, got 2"),
        ({"symmetric": False}, "weight_zero_point is missing"),
    ],
)
def test_a_record_that_contradicts_is_refused(tmp_path, record, message):
    folder = tmp_path / "int4"
    write_adapter(folder, {"q_proj": random_module(2, 4, 3)}, bits=4)
    spoil(folder, **record)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_adapter(folder)


def test_a_type_without_its_record_is_refused(tmp_path):
    folder = write_folder(tmp_path / "int4", keyed(), peft_type="LORA_INT4")
    with pytest.raises(ValueError, match="quantization_config must be an object for LORA_INT4"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 8}, ValueError, "bits must be 4 or None, got 8"),
        ({"bits": True}, ValueError, "bits must be 4 or None, got True"),
        (
            {"bits": 4, "group_size": 48},
            ValueError,
            "group_size must divide the columns of base_model.model.q_proj.lora_A.weight, 64, or "
            "be larger, got 48; 16 does",
        ),
        ({"bits": 4, "group_size": 0}, ValueError, "or be larger, got 0"),
        ({"bits": 4, "group_size": 8.0}, TypeError, "group_size must be an int, got float"),
    ],
)
def test_writing_refuses_and_leaves_nothing(tmp_path, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        write_adapter(tmp_path / "int4", {"q_proj": random_module(2, 64, 3)}, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_is_refused_with_its_key(tmp_path):
    module = random_module(2, 64, 3)
    module.b[1, 1] = torch.nan
    with pytest.raises(
        ValueError, match=r"lora_B.weight: weight must be finite, got nan at \[1, 1\]"
    ):
        write_adapter(tmp_path / "int4", {"q_proj": module}, bits=4)
