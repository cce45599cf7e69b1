"""The plain base that tests of adapters share."""

import pytest

from support.layouts import Model, quantization


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Return a Llama of two layers, and its folder."""
    model = Model().llama()
    return model, model.save(tmp_path_factory.mktemp("layouts") / "base", quantization())
