"""Checkpoints and adapters of a few KB, packed with numpy by the format's description alone."""

import json

import numpy
import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
LOW, HIGH, CODES = -8, 7, 8  # codes of 4 bits, and how many a word holds


def pack_rows(codes):
    """Pack signed codes [rows, columns] into int32 words, the first code in the lowest bits."""
    rows, columns = codes.shape
    padded = numpy.zeros((rows, -(-columns // CODES) * CODES), dtype=numpy.uint32)
    padded[:, :columns] = codes - LOW
    shifts = 4 * numpy.arange(CODES, dtype=numpy.uint32)
    words = (padded.reshape(rows, -1, CODES) << shifts).sum(2, dtype=numpy.uint32)
    return torch.from_numpy(words.view(numpy.int32))


def unpack_rows(words, columns):
    """Return the signed codes of packed words."""
    shifts = 4 * numpy.arange(CODES, dtype=numpy.uint32)
    nibbles = (words.numpy().view(numpy.uint32)[:, :, None] >> shifts) & 15
    return nibbles.reshape(len(nibbles), -1)[:, :columns].astype(numpy.int64) + LOW


def module(rows, columns, *, strategy="group", group=32, symmetric=True, seed=0):
    """Return a module's tensors by the last part of their names, and its dense weight."""
    random = numpy.random.default_rng(seed)
    codes = random.integers(LOW, HIGH + 1, (rows, columns))
    table = {"tensor": (1, 1), "channel": (rows, 1)}.get(strategy, (rows, columns // group))
    scale = torch.from_numpy(random.uniform(0.01, 0.02, table)).to(torch.bfloat16)
    zeros = numpy.zeros(table, int) if symmetric else random.integers(LOW, HIGH + 1, table)
    row = numpy.arange(rows) % table[0]
    column = numpy.arange(columns) // -(-columns // table[1])
    spread = numpy.ix_(row, column)
    differences = torch.from_numpy(codes - zeros[spread]).to(torch.bfloat16)
    parts = {
        "weight_packed": pack_rows(codes),
        "weight_scale": scale.reshape(1) if strategy == "tensor" else scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric and strategy == "tensor":
        parts["weight_zero_point"] = torch.from_numpy(zeros.reshape(1).astype(numpy.int8))
    elif not symmetric:
        parts["weight_zero_point"] = pack_rows(zeros.T).T.contiguous()
    return parts, differences * scale[spread]


def unpacked(tensors, name):
    """Return the dense weight of a symmetric module in groups, in float64 before rounding."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scale = tensors[f"{name}.weight_scale"]
    column = torch.arange(columns) // (columns // scale.shape[1])
    codes = torch.from_numpy(unpack_rows(tensors[f"{name}.weight_packed"], columns))
    assert len(codes) == rows
    return (codes.to(scale.dtype) * scale[:, column]).double()


def quantization(targets=("Linear",), **weights):
    """Return a ``quantization_config`` of one group."""
    usual = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    if weights.get("strategy", "group") == "group":
        usual["group_size"] = 32
    group = {"targets": list(targets), "weights": usual | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


class Handmade:
    """A checkpoint that is being made: its tensors, and what a dense one holds."""

    def __init__(self):
        self.tensors, self.dense, self.quantised = {}, {}, []

    def add(self, name, *shape, dtype=torch.bfloat16):
        """Add a dense tensor."""
        generator = torch.Generator().manual_seed(len(self.tensors))
        self.tensors[name] = torch.randn(shape, generator=generator).to(dtype)
        self.dense[name] = self.tensors[name]
        return self

    def quantise(self, name, rows, columns, *, shape_dtype=torch.int64, **options):
        """Add a quantised module."""
        parts, dense = module(rows, columns, seed=len(self.tensors), **options)
        parts["weight_shape"] = parts["weight_shape"].to(shape_dtype)
        self.tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        self.dense[f"{name}.weight"] = dense
        self.quantised.append(name)
        return self

    def save(self, folder, config=None, *, shards=1):
        """Write the checkpoint; neighbouring tensors lie in different shards."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"quantization_config": quantization()} if config is None else config
        (folder / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(self.tensors, folder / "model.safetensors")
            return folder
        weight_map = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            own = dict(list(self.tensors.items())[shard::shards])
            save_file(own, folder / name)
            weight_map |= dict.fromkeys(own, name)
        write_index(folder, weight_map)
        return folder


def small():
    """Return a checkpoint of two layers, a head and a norm."""
    made = Handmade().add("model.embed_tokens.weight", 48, 64)
    for layer in range(2):
        made.quantise(f"model.layers.{layer}.self_attn.q_proj", 64, 64)
        made.quantise(f"model.layers.{layer}.mlp.down_proj", 64, 96)
        made.add(f"model.layers.{layer}.input_layernorm.weight", 64)
    return made.add("model.norm.weight", 64).add("lm_head.weight", 48, 64)


def read_index(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(folder, shapes, *, rank=4, alpha=8, seed=0):
    """Write a LoRA adapter; return what it adds to each weight, in float64."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for name, (rows, columns) in shapes.items():
        a = torch.randn(rank, columns, generator=generator) / 16
        b = torch.randn(rows, rank, generator=generator) / 16
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        deltas[name] = alpha / rank * (b.double() @ a.double())
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    last = sorted({name.rpartition(".")[2] for name in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": last}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas
