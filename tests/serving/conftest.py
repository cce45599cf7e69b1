"""Fixtures of the tests in real vLLM; only where vLLM is installed."""

from importlib.util import find_spec

import pytest

from support.engines import VOCABULARY

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Let vLLM and what it imports warn."""
    for item in items:
        if item.path.parent.name == "serving":
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Let layers be built without an engine: a configuration, and one process that is all ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    store = tmp_path_factory.mktemp("rank") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def prompts():
    """Return prompts of 33 tokens: 32 of them are predicted."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (4, 33), generator=generator).tolist()
