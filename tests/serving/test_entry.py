"""The entry point never stops a vLLM that does not use the flag."""

import importlib
import importlib.abc
import logging
import pkgutil
import sys

import pytest

from int4_lora.integration import vllm_plugin
from support.engines import CONFIG, run_in_process

MODULES = sorted(module.name for module in pkgutil.iter_modules(vllm_plugin.__path__))
PACKAGE = vllm_plugin.__name__


class Broken(importlib.abc.MetaPathFinder):
    """Let the import of modules fail."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.names:
            raise RuntimeError(f"{fullname} is broken")


@pytest.fixture
def forgotten(monkeypatch):
    """Let the plug-in be imported and registered again."""
    from vllm.model_executor.layers import quantization

    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("module", [name for name in MODULES if name != "entry"])
def test_a_module_that_fails(module, forgotten, monkeypatch, caplog):
    """The flag answers for models of others, or is not registered."""
    from vllm.model_executor.layers import quantization

    monkeypatch.setattr(sys, "meta_path", [Broken(f"{PACKAGE}.{module}"), *sys.meta_path])
    logger = logging.getLogger("vllm.int4_lora")
    logger.addHandler(caplog.handler)
    try:
        importlib.import_module(f"{PACKAGE}.entry").install()
    finally:
        logger.removeHandler(caplog.handler)
    flag = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get("int4_lora")
    assert (flag is None) == (module == "flag")
    if flag is None:
        assert "int4_lora: --quantization int4_lora is not there: RuntimeError" in caplog.text
    else:
        assert flag.override_quantization_method(CONFIG, None) is None
        assert flag.override_quantization_method({"quant_method": "gptq"}, "gptq") is None
        assert caplog.text == ""


def test_nothing_of_the_backend_is_imported_before_the_flag_is_used(forgotten):
    importlib.import_module(f"{PACKAGE}.entry").install()
    imported = {name for name in sys.modules if name.startswith(f"{PACKAGE}.")}
    assert imported == {f"{PACKAGE}.entry", f"{PACKAGE}.flag"}


BREAK = """
import importlib.abc, sys

class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("int4_lora.") and not fullname.endswith((".entry", ".integration",
                                                                        ".vllm_plugin")):
            raise RuntimeError(fullname + " is broken")

sys.meta_path.insert(0, Broken())
"""


@pytest.mark.nightly
def test_stock_vllm_answers_while_every_module_fails(tiny_models, prompts, tmp_path):
    asked = (tiny_models["g128"], {}, prompts[:1], {})
    right, _ = run_in_process(tmp_path, *asked)
    (tmp_path / "sitecustomize.py").write_text(BREAK)
    answer, output = run_in_process(tmp_path, *asked)
    assert answer == right
    assert "int4_lora: --quantization int4_lora is not there: RuntimeError" in output
