"""Fixtures of the tests in real vLLM; only where vLLM is installed."""

from importlib.util import find_spec

import pytest

from support.engines import VOCABULARY, one_rank

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Let vLLM and what it imports warn."""
    for item in items:
        if item.path.parent.name == "serving":
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="module", name="one_rank")
def _one_rank(tmp_path_factory):
    """Let layers be built without an engine."""
    with one_rank(tmp_path_factory.mktemp("rank")):
        yield


@pytest.fixture(scope="session")
def prompts():
    """Return prompts of 33 tokens: 32 of them are predicted."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (4, 33), generator=generator).tolist()
