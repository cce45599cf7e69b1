"""What the backend relies on is there in the installed vLLM, and what is not is named."""

import pytest

from int4_lora.integration.vllm_plugin import upstream
from int4_lora.integration.vllm_plugin.upstream import Symbol, missing, untested


def test_every_symbol_is_there():
    assert missing() == []


def test_this_minor_ran_end_to_end():
    assert untested() is None


@pytest.mark.parametrize(
    ("symbol", "sentence"),
    [
        (Symbol("vllm.lora.nowhere", "Thing"), "vllm.lora.nowhere.Thing is missing"),
        (Symbol("vllm.lora.utils", "from_nothing"), "vllm.lora.utils.from_nothing is missing"),
        (Symbol("vllm.lora.utils", "from_layer", ("player",)), "no longer takes player"),
        (Symbol("vllm.lora.utils", "_all_lora_classes", ("x",)), "cannot be called"),
    ],
)
def test_what_is_gone_is_named(symbol, sentence, monkeypatch):
    monkeypatch.setattr(upstream, "SYMBOLS", (symbol,))
    assert sentence in missing()[0]


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.32.0", "", None, "dev"])
def test_another_minor_is_refused(version, monkeypatch):
    monkeypatch.setattr(upstream, "installed_version", lambda: version)
    assert "install one of 0.32" in (untested() or "")
