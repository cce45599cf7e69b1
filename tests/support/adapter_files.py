"""Adapters written by hand, tensor by tensor."""

import json

import torch
from safetensors.torch import save_file

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"
SHAPES = {Q_PROJ: (6, 4), DOWN_PROJ: (4, 10)}


def pairs(rank=2, dtype=torch.float32):
    """Return lora_A and lora_B of two layers."""
    generator = torch.Generator().manual_seed(21)
    return {
        name: (
            torch.randn(rank, columns, generator=generator).to(dtype),
            torch.randn(rows, rank, generator=generator).to(dtype),
        )
        for name, (rows, columns) in SHAPES.items()
    }


def keyed(key="base_model.model.{module}.lora_{matrix}.weight", modules=None):
    """Return the tensors of an adapter by their keys."""
    return {
        key.format(module=name, matrix=matrix): tensor
        for name, pair in (modules or pairs()).items()
        for matrix, tensor in zip("AB", pair, strict=True)
    }


def write_folder(folder, tensors, **settings):
    """Write an adapter's folder; shards, if ``tensors`` is a mapping by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}
    config["target_modules"] = ["q_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    sharded = any(isinstance(value, dict) for value in tensors.values())
    for file, content in (tensors if sharded else {"adapter_model.safetensors": tensors}).items():
        save_file(content, folder / file)
    return folder
