"""Tiny checkpoints and adapters in layouts of public reports, written and computed by hand.

Scales are multiples of 2^-10 and the entries of A and B are multiples of 2^-4, so that float32
holds every weight and every merged weight exactly, and one rounding makes the expected value.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from support.conversion import convert, run, tensors_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def pack(codes, bits=4):
    """Pack signed codes [rows, columns] along the columns, the first code in the lowest bits."""
    count = 32 // bits
    unsigned = codes.astype(np.int64) + 2 ** (bits - 1)
    rows, columns = unsigned.shape
    padded = np.zeros((rows, -(-columns // count) * count), np.int64)
    padded[:, :columns] = unsigned
    words = (padded.reshape(rows, -1, count) << (bits * np.arange(count))).sum(2)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def group(targets=("Linear",), **weights):
    """Return a config group as llm-compressor writes it."""
    return {
        "targets": list(targets),
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
            "observer": "minmax",
            "observer_kwargs": {},
            **weights,
        },
        "input_activations": None,
        "output_activations": None,
    }


def quantization(groups=None, **fields):
    """Return a quantization_config."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups or {"group_0": group()},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        **fields,
    }


class Model:
    """A model's stored tensors, and the dense tensors that they stand for.

    Args:
        seed: the seed of all values.
    """

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.stored, self.dense = {}, {}

    def put(self, name, tensor):
        """Add a tensor that stands for itself."""
        self.stored[name] = self.dense[name] = tensor

    def plain(self, name, *shape):
        """Add a random tensor that is not quantised."""
        values = self.random.integers(-64, 64, shape) / 512
        self.put(name, torch.tensor(values, dtype=torch.bfloat16))

    def packed(self, name, rows, columns, *, size=32, bits=4, zero_points=False, scales=127):
        """Add a packed linear layer, whose scales are up to ``scales`` / 1024."""
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = self.random.integers(low, high, (rows, columns))
        scale = self.random.integers(1, scales + 1, (rows, columns // size)) / 1024
        zero = self.random.integers(low, high, scale.shape) * bool(zero_points)
        values = (codes - zero.repeat(size, 1)) * scale.repeat(size, 1)
        self.dense[f"{name}.weight"] = torch.tensor(values, dtype=torch.bfloat16)
        self.stored[f"{name}.weight_packed"] = pack(codes, bits)
        self.stored[f"{name}.weight_scale"] = torch.tensor(scale, dtype=torch.bfloat16)
        self.stored[f"{name}.weight_shape"] = torch.tensor([rows, columns])
        if zero_points:
            self.stored[f"{name}.weight_zero_point"] = pack(zero.T, bits).T.contiguous()

    def llama(self, layers=2, prefix="model.", head="lm_head", **how):
        """Add a Llama whose linear layers are packed, and return the model."""
        self.plain(f"{prefix}embed_tokens.weight", 48, 64)
        for layer in range(layers):
            for name, shape in LAYER.items():
                self.packed(f"{prefix}layers.{layer}.{name}", *shape, **how)
            for name in NORMS:
                self.plain(f"{prefix}layers.{layer}.{name}.weight", 64)
        self.plain(f"{prefix}norm.weight", 64)
        if head:
            self.plain(f"{head}.weight", 48, 64)
        return self

    def merged(self, pairs, scaling=2.0):
        """Return the dense tensors after W + scaling * B A, rounded once."""
        merged = dict(self.dense)
        for module, (a, b) in pairs.items():
            weight = merged[f"{module}.weight"]
            merged[f"{module}.weight"] = (weight.float() + scaling * (b @ a)).to(weight.dtype)
        return merged

    def save(self, folder, quantized=None, config=LLAMA, shards=1):
        """Write the checkpoint, in one file or in shards with an index, and return its folder."""
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {**config, "quantization_config": quantized})
        if shards == 1:
            write_tensors(folder / "model.safetensors", self.stored)
            return folder
        files = {
            f"model-{part + 1:05}-of-{shards:05}.safetensors": list(self.stored)[part::shards]
            for part in range(shards)
        }
        for file, names in files.items():
            write_tensors(folder / file, {name: self.stored[name] for name in names})
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
        return folder


def write_json(file, content):
    """Write JSON."""
    Path(file).write_text(json.dumps(content))


def write_tensors(file, tensors):
    """Write a safetensors file as transformers does."""
    save_file(tensors, file, metadata={"format": "pt"})


def pairs_of(shapes, rank=4, seed=1):
    """Return random (A, B) of modules, float32, by name."""
    random = np.random.default_rng(seed)

    def matrix(*shape):
        return torch.tensor(random.integers(-2, 3, shape) / 16, dtype=torch.float32)

    return {
        name: (matrix(rank, columns), matrix(rows, rank))
        for name, (rows, columns) in shapes.items()
    }


def lora_tensors(pairs, key="base_model.model.{}.lora_{}.weight"):
    """Return the tensors of an adapter file."""
    return {
        key.format(name, matrix): tensor
        for name, pair in pairs.items()
        for matrix, tensor in zip("AB", pair, strict=True)
    }


def lora_config(pairs, **fields):
    """Return the adapter_config.json that PEFT 0.4 and later read."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        **fields,
    }


def write_adapter(folder, tensors, config):
    """Write an adapter's folder, and return it."""
    folder.mkdir(parents=True)
    write_json(folder / "adapter_config.json", config)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def adapter(folder, shapes, **fields):
    """Write a plain adapter for modules; return its folder and its pairs."""
    pairs = pairs_of(shapes)
    return write_adapter(folder, lora_tensors(pairs), lora_config(pairs, **fields)), pairs


def assert_dense(model, source, target):
    """Check that ``verify`` agrees, and that ``unpack`` gives every dense tensor and no other."""
    assert run("verify", source).exit_code == 0
    convert("unpack", source, target)
    assert_tensors(target, model.dense)


def assert_tensors(folder, expected):
    """Check that a checkpoint holds these tensors, bit for bit, and no others."""
    actual = tensors_of(folder)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_merged(model, pairs, source, folder, target):
    """Check that ``inspect`` says that an adapter fits, and that ``merge`` adds it."""
    report = run("inspect", source, "--adapter", folder)
    assert report.exit_code == 0, report.output
    convert("merge", source, target, "--adapter", folder)
    assert_tensors(target, model.merged(pairs))
