"""Tiny INT4 Llamas in every variant that compressed-tensors has written."""

import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import edit_config, weights
from support.upstream_versions import IGNORES_G_IDX

GROUP = {"strategy": "group", "group_size": 128}
GROUP_32 = {"strategy": "group", "group_size": 32}
VARIANTS = {
    "g128": GROUP,
    "g32": GROUP_32,
    "asym-g128": {**GROUP, "symmetric": False},
    "asym-g32": {**GROUP_32, "symmetric": False},
    "channel": {"strategy": "channel"},
    "asym-channel": {"strategy": "channel", "symmetric": False},
    "actorder-g128": {**GROUP, "actorder": "group"},
    "actorder-weight-g128": {**GROUP, "actorder": "weight"},
    "w8-g128": {**GROUP, "num_bits": 8},
}
LLAMA = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
# every linear layer is 256 x 256, so that one compiled graph serves all of them
SQUARE = {**LLAMA, "num_key_value_heads": 4, "intermediate_size": 256}


def make_tiny(folder, variant, llama=LLAMA):
    """Make one variant and return its folder."""
    from int4_lora.integration.demo import recipe

    settings = {"num_bits": 4, "type": "int", "symmetric": True, **VARIANTS[variant]}
    by_hand = settings.get("actorder") == "group" and IGNORES_G_IDX
    if by_hand:
        del settings["actorder"]
    recipe.make_model(folder, llama, settings)
    if by_hand:
        add_g_idx(folder)
    return folder


def add_g_idx(folder):
    """Give every module groups of its own order, as compressed-tensors wrote them up to 0.18."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        columns = int(tensors[f"{module}.weight_shape"][1])
        generator = torch.Generator().manual_seed(len(tensors))
        order = torch.randperm(columns, generator=generator)
        tensors[f"{module}.weight_g_idx"] = (order // 128).to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    edit_config(folder, weights(actorder="group"))


def shorten_scales(folder, bits=4):
    """Leave so few significant bits to each scale that (q - z) s is exact in bfloat16.

    In float32 transformers does not round the product to the scale's dtype. Now no one rounds.

    Args:
        folder: the model's folder.
        bits: of its codes: scales keep 3 significant bits for 4, and 1 for 8.
    """
    lost = {4: 0x1F, 8: 0x7F}[bits]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            assert tensor.dtype == torch.bfloat16
            tensors[name] = (tensor.view(torch.int16) & ~lost).view(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
