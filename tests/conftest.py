"""Real checkpoints and adapters, made once a session by compressed-tensors and PEFT."""

import shutil

import hypothesis
import pytest

from support.tiny import VARIANTS, make_tiny

hypothesis.settings.register_profile(
    "house", derandomize=True, deadline=None, max_examples=60, print_blob=True
)
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Return the folder of a tiny INT4 Llama of every variant, by name."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny(root / name, name) for name in VARIANTS}


@pytest.fixture
def copied_model(tiny_models, tmp_path):
    """Return a copy of one tiny model that a test may spoil."""
    return shutil.copytree(tiny_models["asym-g32"], tmp_path / "copied")


@pytest.fixture(scope="session")
def demo_files(tmp_path_factory):
    """Return the demo's own model and adapters."""
    from int4_lora.integration.demo import recipe

    return recipe.prepare(tmp_path_factory.mktemp("cache"))
