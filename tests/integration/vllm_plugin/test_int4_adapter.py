"""An adapter in INT4 is dequantised into a folder that vLLM loads; others keep theirs."""

from pathlib import Path

import pytest
import torch

from int4_lora.integration import read_adapter, write_adapter
from int4_lora.integration.vllm_plugin.int4_adapter import loadable_folder
from support.adapter_files import keyed, write_folder


def test_an_adapter_in_floats_and_a_name_keep_their_path(tmp_path):
    folder = str(write_folder(tmp_path / "floats", keyed()))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    for path in (folder, "owner/name", str(tmp_path / "broken")):
        with loadable_folder(path) as loaded:
            assert loaded == path


def test_an_adapter_in_int4_is_yielded_in_floats_for_a_while(tmp_path):
    modules = read_adapter(write_folder(tmp_path / "floats", keyed())).modules
    written = write_adapter(tmp_path / "int4", modules, bits=4)
    with loadable_folder(str(tmp_path / "int4")) as loaded:
        assert Path(loaded) != tmp_path / "int4"
        adapter = read_adapter(loaded)
        assert adapter.notes == ()
        for name, module in written.modules.items():
            assert torch.equal(adapter.modules[name].a, module.a)
            assert torch.equal(adapter.modules[name].b, module.b)
    assert not Path(loaded).exists()


def test_a_fault_names_the_file(tmp_path):
    modules = read_adapter(write_folder(tmp_path / "floats", keyed())).modules
    write_adapter(tmp_path / "int4", modules, bits=4)
    (tmp_path / "int4" / "adapter_model.safetensors").unlink()
    with (
        pytest.raises(FileNotFoundError, match=r"int4/adapter_model.safetensors is not there"),
        loadable_folder(str(tmp_path / "int4")),
    ):
        pass
