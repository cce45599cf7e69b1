"""Sources and adapters that the tests of conversions share."""

import shutil

import pytest

from support.checkpoints import shard
from support.tiny import LLAMA


@pytest.fixture(scope="session")
def sharded(tiny_models, tmp_path_factory):
    """Return an INT4 checkpoint in three shards, with a tokenizer beside them."""
    folder = tmp_path_factory.mktemp("sharded") / "source"
    shutil.copytree(tiny_models["asym-g32"], folder)
    shard(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Return two adapters: one of every linear layer, one of three, of which lm_head is dense."""
    from int4_lora.integration.demo import recipe

    root = tmp_path_factory.mktemp("merged-adapters")
    for name, targets in (("all", "all-linear"), ("some", ["q_proj", "down_proj", "lm_head"])):
        settings = {"r": 5, "lora_alpha": 2, "target_modules": targets}
        recipe.make_adapter(root / name, LLAMA, name, settings)
    return [root / "all", root / "some"]


@pytest.fixture(scope="session")
def adapter(adapters):
    """Return the adapter of every linear layer."""
    return adapters[0]
