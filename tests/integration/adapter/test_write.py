"""write_adapter: read back bit for bit, by us and by PEFT."""

import dataclasses
import math

import hypothesis
import peft
import pytest
import torch
import transformers
from hypothesis import strategies as st
from safetensors.torch import load_file

from int4_lora.integration import AdapterModule, read_adapter, write_adapter
from int4_lora.integration.adapter.write import _alpha
from int4_lora.integration.demo import recipe
from support.adapters import assert_equal

pytestmark = pytest.mark.versions

Q_PROJ = "model.layers.0.self_attn.q_proj"


def test_written_and_read_back(demo_files, tmp_path):
    adapters = [read_adapter(demo_files.adapters[name]) for name in "abc"]
    modules = dict(adapters[2].modules) | dict(adapters[0].modules)
    odd = next(iter(modules))
    modules[odd] = dataclasses.replace(modules[odd], scaling=0.1)
    written = write_adapter(tmp_path / "mixed", modules, base_model="base")
    assert_equal(written.modules, modules)
    assert written.config["base_model_name_or_path"] == "base"
    assert [file.name for file in tmp_path.iterdir()] == ["mixed"]


def test_a_name_that_is_the_end_of_another_does_not_speak_for_it(tmp_path):
    def module(rank, scaling):
        return AdapterModule(torch.ones(rank, 4), torch.ones(3, rank), scaling)

    modules = {"b": module(1, 1.0), "a.b": module(2, 2.0), "x.a.b": module(2, 0.3)}
    modules |= {"c": module(2, 2.0), "d": module(2, 2.0)}
    assert_equal(write_adapter(tmp_path / "out", modules).modules, modules)


@pytest.mark.parametrize("rank", [2, 3, 5, 7, 12, 48, 200])
def test_stabilised_scalings_are_written_exactly(tmp_path, rank):
    modules = {
        f"model.layers.{layer}.q_proj": AdapterModule(
            torch.ones(rank, 4), torch.ones(3, rank), alpha / math.sqrt(rank)
        )
        for layer, alpha in enumerate((1, 8, 16, 100))
    }
    back = write_adapter(tmp_path / "out", modules)
    for name, module in modules.items():
        assert back.modules[name].scaling == module.scaling


def test_a_whole_number_is_a_scaling(tmp_path):
    module = AdapterModule(torch.ones(2, 4), torch.ones(3, 2), scaling=2)
    assert write_adapter(tmp_path / "out", {"q_proj": module}).modules["q_proj"].scaling == 2.0


@hypothesis.given(st.floats(1e-3, 1e3), st.integers(1, 512))
def test_any_scaling_survives_to_the_last_place(scaling, rank):
    assert _alpha(scaling, rank) / rank == pytest.approx(scaling, rel=2.0**-52)


def test_peft_loads_what_was_written(demo_files, tmp_path):
    adapter = read_adapter(demo_files.adapters["c"])
    write_adapter(tmp_path / "written", adapter.modules)
    config = peft.PeftConfig.from_pretrained(tmp_path / "written")
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**recipe.LLAMA))
    model = peft.PeftModel(base.to_empty(device="cpu"), config)
    tensors = load_file(tmp_path / "written" / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    for name, module in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == module.scaling
        assert torch.equal(layer.lora_B["default"].weight, module.b)


def test_writing_refuses_and_leaves_nothing(demo_files, tmp_path):
    modules = dict(read_adapter(demo_files.adapters["a"]).modules)
    first = modules[Q_PROJ]
    cases = [
        (ValueError, "modules must not be empty", {}),
        (ValueError, "scaling must be finite, got nan",
         {Q_PROJ: dataclasses.replace(first, scaling=math.nan)}),
        (ValueError, r"q_proj: a must be \[rank, in\] and b \[out, rank\], got",
         {Q_PROJ: dataclasses.replace(first, b=first.b[:, 1:])}),
        (TypeError, "a and b must have one dtype, got torch.float32 and torch.float16",
         {Q_PROJ: dataclasses.replace(first, b=first.b.half())}),
        (TypeError, "a must be a float tensor, got torch.int64",
         {Q_PROJ: dataclasses.replace(first, a=first.a.long())}),
        (TypeError, "b must be a float tensor, got list",
         {Q_PROJ: dataclasses.replace(first, b=[1.0])}),
        (ValueError, r"a must be 2-D and not empty, got \[0, ",
         {Q_PROJ: dataclasses.replace(first, a=first.a[:0], b=first.b[:, :0])}),
        (ValueError, r"a must be 2-D and not empty, got \[\]",
         {Q_PROJ: dataclasses.replace(first, a=torch.tensor(1.0))}),
        (TypeError, "scaling must be a number, got Tensor",
         {Q_PROJ: dataclasses.replace(first, scaling=torch.tensor(1.0))}),
    ]  # fmt: skip
    for error, message, wrong in cases:
        with pytest.raises(error, match=message):
            write_adapter(tmp_path / "new" / "out", wrong)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in ("out", "dangling"):
        with pytest.raises(FileExistsError, match="is there already"):
            write_adapter(tmp_path / taken, modules)
