"""Models whose columns are in the order of activations."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import edit_config, weights

MERGED = {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 2, "gate_proj": 3, "up_proj": 3}


def order_of_inputs(name):
    """Return a number for each order of columns: modules that vLLM merges have one in common."""
    return MERGED.get(name, 4)


def ordered(model, folder, actorder="group", order_of=order_of_inputs):
    """Copy a model with groups of 128 and give each module an activation order."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        columns = int(tensors[f"{module}.weight_shape"][1])
        generator = torch.Generator().manual_seed(order_of(module.rpartition(".")[2]))
        order = torch.randperm(columns, generator=generator)
        tensors[f"{module}.weight_g_idx"] = (order // 128).to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, weights(actorder=actorder))
    return folder
