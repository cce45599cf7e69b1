"""remarks: adapters that add nothing, and adapters of adapters."""

import pytest
import torch

from int4_lora.integration.adapter.adapter import AdapterModule
from int4_lora.integration.adapter.remarks import remarks

TRAINED = AdapterModule(torch.ones(2, 8), torch.ones(4, 2), scaling=2.0)
UNTRAINED = AdapterModule(torch.ones(2, 8), torch.zeros(4, 2), scaling=2.0)
SCALED_AWAY = AdapterModule(torch.ones(2, 8), torch.ones(4, 2), scaling=0.0)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (UNTRAINED, ("its pairs add nothing: one matrix of each is zero, as before training",)),
        (SCALED_AWAY, ("its pairs add nothing: lora_alpha is 0",)),
        (TRAINED, ()),
    ],
)
def test_what_adds_nothing(module, said):
    config = {"lora_alpha": 0}
    assert remarks(config, {"a": module, "b": module}) == said
    assert remarks(config, {"a": module, "b": TRAINED}) == ()
    assert remarks(config, {}) == ()


@pytest.mark.parametrize("base", [None, "", "some/base", "\0", "x" * 5000, 7])
def test_a_base_that_is_no_adapter(base):
    assert remarks({"base_model_name_or_path": base}, {"a": TRAINED}) == ()


def test_a_base_that_is_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (said,) = remarks({"base_model_name_or_path": str(tmp_path)}, {"a": TRAINED})
    assert str(tmp_path) in said
