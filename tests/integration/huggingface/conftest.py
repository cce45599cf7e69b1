"""INT4 models of transformers, whose layers all have one shape."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.tiny import SQUARE, make_tiny
from support.upstream_versions import REFUSES_ZERO_POINTS


@pytest.fixture(scope="session")
def square(tmp_path_factory):
    """Return a function that returns the folder of a variant of support.tiny."""
    root, made = tmp_path_factory.mktemp("square"), {}

    def folder_of(variant):
        if REFUSES_ZERO_POINTS and "asym" in variant:
            pytest.skip("transformers refuses zero-points of compressed-tensors 0.20")
        if variant not in made:
            made[variant] = make_tiny(root / variant, variant, SQUARE)
            shorten_scales(made[variant])
        return made[variant]

    return folder_of


def shorten_scales(folder):
    """Leave 3 significant bits to each scale, so that (q - z) s is exact in bfloat16.

    In float32 transformers does not round the product to the scale's dtype. Now no one rounds.
    """
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            assert tensor.dtype == torch.bfloat16
            tensors[name] = (tensor.view(torch.int16) & ~0x1F).view(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def decompressed(square):
    """Return a function that returns a variant in float32 as transformers decompresses it."""
    from transformers import AutoModelForCausalLM

    made = {}

    def model_of(variant):
        if variant not in made:
            model = AutoModelForCausalLM.from_pretrained(square(variant), dtype=torch.float32)
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64))  # decompresses
            made[variant] = model
        return made[variant]

    return model_of
