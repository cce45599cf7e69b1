"""A small checkpoint of every strategy, whose index and tensors a test may spoil."""

import json

import numpy as np
import torch

from support import layouts

INDEX = "model.safetensors.index.json"


def unpack_rows(words, columns):
    """Return the signed 4-bit codes of packed words."""
    shifts = 4 * np.arange(8, dtype=np.uint32)
    nibbles = (words.numpy().view(np.uint32)[:, :, None] >> shifts) & 15
    return nibbles.reshape(len(nibbles), -1)[:, :columns].astype(np.int64) - 8


def quantization(**weights):
    """Return a ``quantization_config`` of one group."""
    if weights.get("strategy", "group") != "group":
        weights["group_size"] = None
    return layouts.quantization({"group_0": layouts.group(**weights)})


class Handmade(layouts.Model):
    """A checkpoint that is being made; ``quantised`` has the names of its packed modules."""

    def __init__(self):
        super().__init__()
        self.quantised = []

    def quantise(self, name, rows, columns, *, strategy="group", symmetric=True):
        """Add a packed module."""
        self.quantised.append(name)
        if strategy == "group":
            self.packed(name, rows, columns, zero_points=not symmetric)
            return
        codes = self.random.integers(-8, 8, (rows, columns))
        scale = self.random.integers(1, 128, (rows, 1) if strategy == "channel" else (1,)) / 1024
        zero = 0 if symmetric else int(self.random.integers(-8, 8))
        self.dense[f"{name}.weight"] = torch.tensor((codes - zero) * scale, dtype=torch.bfloat16)
        self.stored[f"{name}.weight_packed"] = layouts.pack(codes)
        self.stored[f"{name}.weight_scale"] = torch.tensor(scale, dtype=torch.bfloat16)
        self.stored[f"{name}.weight_shape"] = torch.tensor([rows, columns])
        if not symmetric:
            assert strategy == "tensor"
            self.stored[f"{name}.weight_zero_point"] = torch.tensor([zero], dtype=torch.int8)

    def save(self, folder, config=None, *, shards=1):
        """Write the checkpoint, by default with one group of the strategy group."""
        config = {"quantization_config": quantization()} if config is None else config
        super().save(folder, config=config, shards=shards)
        layouts.write_json(folder / "config.json", config)
        return folder


def small():
    """Return a checkpoint of two layers, a head and a norm."""
    made = Handmade()
    made.plain("model.embed_tokens.weight", 48, 64)
    for layer in range(2):
        made.quantise(f"model.layers.{layer}.self_attn.q_proj", 64, 64)
        made.quantise(f"model.layers.{layer}.mlp.down_proj", 64, 96)
        made.plain(f"model.layers.{layer}.input_layernorm.weight", 64)
    made.plain("model.norm.weight", 64)
    made.plain("lm_head.weight", 48, 64)
    return made


def read_index(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def write_index(folder, weight_map):
    layouts.write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def make_adapter(folder, shapes):
    """Write an adapter; return what it adds to each weight, in float64."""
    _, pairs = layouts.adapter(folder, shapes)
    return {name: 2 * (b.double() @ a.double()) for name, (a, b) in pairs.items()}
