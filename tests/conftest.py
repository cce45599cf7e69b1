"""Real checkpoints and adapters, made once a session by compressed-tensors and PEFT."""

import shutil
from importlib.util import find_spec

import hypothesis
import pytest
from typer.testing import CliRunner

from support.tiny import LLAMA, VARIANTS, make_tiny

collect_ignore = [] if find_spec("llmcompressor") else ["oneshot"]

hypothesis.settings.register_profile(
    "house", derandomize=True, deadline=None, max_examples=60, print_blob=True
)
hypothesis.settings.register_profile(
    "thorough", deadline=None, max_examples=600, print_blob=True
)  # with --hypothesis-profile=thorough, as ``tox run -m nightly`` does
hypothesis.settings.load_profile("house")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep what the tests find out away from the user's own cache, for child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INT4_LORA_CACHE", str(tmp_path_factory.mktemp("int4-lora-cache")))
        yield


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


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory):
    """Return the folders of the demo's adapters, made for the tiny models."""
    from int4_lora.integration.demo import recipe

    root = tmp_path_factory.mktemp("adapters")
    for name, settings in recipe.ADAPTERS.items():
        recipe.make_adapter(root / name, LLAMA, name, settings)
    return {name: root / name for name in recipe.ADAPTERS}


@pytest.fixture
def run(tiny_models, tiny_adapters):
    """Return a call of ``int4-lora demo`` on a tiny model and its adapters."""
    from int4_lora.integration.cli.app import app

    def call(*options, model=tiny_models["g32"], adapters=tiny_adapters):
        named = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
        return CliRunner().invoke(app, ["demo", f"--model={model}", *named, "--tokens=8", *options])

    return call
