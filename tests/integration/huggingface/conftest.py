"""INT4 models of transformers, whose layers all have one shape."""

import pytest
import torch

from int4_lora.integration.huggingface.zero_points import packed_zero_points
from support.tiny import SQUARE, VARIANTS, make_tiny, shorten_scales


@pytest.fixture(scope="session")
def square(tmp_path_factory):
    """Return a function that returns the folder of a variant of support.tiny."""
    root, made = tmp_path_factory.mktemp("square"), {}

    def folder_of(variant):
        if variant not in made:
            made[variant] = make_tiny(root / variant, variant, SQUARE)
            shorten_scales(made[variant], VARIANTS[variant].get("num_bits", 4))
        return made[variant]

    return folder_of


@pytest.fixture(scope="session")
def decompressed(square):
    """Return a function that returns a variant in float32 as transformers decompresses it."""
    from transformers import AutoModelForCausalLM

    made = {}

    def model_of(variant):
        if variant not in made:
            with packed_zero_points():
                model = AutoModelForCausalLM.from_pretrained(square(variant), dtype=torch.float32)
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.int64))  # decompresses
            made[variant] = model
        return made[variant]

    return model_of
