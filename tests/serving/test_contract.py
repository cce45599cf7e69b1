"""What the backend relies on in the installed vLLM: symbols, parameters and behaviour.

``tox run -e vllm`` runs it, and ``vllm-contract`` on a vLLM whose engine does not start on a CPU.
"""

import inspect
import logging
import re
import sys
from pathlib import Path

import pytest
import torch

from int4_lora.integration.vllm_plugin import contract
from int4_lora.integration.vllm_plugin.contract import (
    Attribute,
    Symbol,
    check_installed,
    installed_version,
    missing,
    too_old,
    untested,
)
from support.engines import CONFIG

pytestmark = pytest.mark.versions

INPUTS, OUTPUTS, RANK, SLOTS = 256, 128, 8, 2
PREFIX = "model.layers.0.mlp.up_proj"


PAGE = Path(__file__).parents[2] / "docs" / "vllm-maintainers.md"


def test_every_symbol_is_there():
    assert missing() == []


def test_the_installed_minor_is_taken():
    installed = installed_version()
    assert installed is not None
    minor = tuple(int(part) for part in installed.split(".")[:2])
    assert too_old() is None
    assert (untested() is None) == (minor in contract.TESTED)


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
    monkeypatch.setattr(contract, "SYMBOLS", (symbol,))
    assert sentence in missing()[0]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("vllm.config:ParallelConfig", "pipeline_parallel_sizes"),  # not a field
        ("vllm.model_executor.layers.linear:LinearBase", "skip_bias"),  # set by no method
        ("vllm.lora.layers:NoLayer", "lora_a_stacked"),  # no such class
    ],
)
def test_an_attribute_that_is_gone_is_named(owner, name, monkeypatch):
    module, _, owner = owner.partition(":")
    monkeypatch.setattr(contract, "ATTRIBUTES", (Attribute(module, owner, name, "read"),))
    (sentence,) = missing()
    assert f"{module}.{owner}" in sentence
    assert "no longer has" in sentence or "is missing" in sentence


def test_a_parameter_that_a_decorator_hides_is_looked_for(monkeypatch):
    """Decorators of ``can_replace_layer`` return functions of ``(*args, **kwargs)``."""
    name = "ColumnParallelLinearWithLoRA.can_replace_layer"
    symbols = (Symbol("vllm.lora.layers", name, ("source_layer", "weather")),)
    monkeypatch.setattr(contract, "SYMBOLS", symbols)
    assert missing() == [f"vllm.lora.layers.{name} no longer takes weather"]


@pytest.fixture
def log():
    """Return what the plug-in logs."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.int4_lora")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("version", ["0.29.1", "0.9.0", "0.29.0.dev3"])
def test_an_older_minor_is_refused(version, monkeypatch):
    monkeypatch.setattr(contract, "installed_version", lambda: version)
    with pytest.raises(ValueError, match=f"vLLM {version} is older than 0.30"):
        check_installed()


@pytest.mark.parametrize("version", ["0.99.0", "1.2.3", "", None, "dev"])
def test_a_minor_that_never_ran_is_taken_with_one_warning(version, monkeypatch, log):
    monkeypatch.setattr(contract, "installed_version", lambda: version)
    check_installed()
    check_installed()
    (line,) = log
    assert f"vLLM {version} never ran with int4_lora" in line


def test_a_broken_contract_stops_the_start(monkeypatch):
    from int4_lora.integration.vllm_plugin.flag import Int4LoRAFlag

    monkeypatch.setattr(contract, "SYMBOLS", (Symbol("vllm.lora.nowhere", "Thing"),))
    sys.modules.pop("int4_lora.integration.vllm_plugin.config", None)  # it may not import either
    sentence = r"int4_lora: vllm\.lora\.nowhere\.Thing is missing .*: install one of vLLM 0\.30, "
    with pytest.raises(ValueError, match=sentence + ".* or leave out --quantization int4_lora"):
        Int4LoRAFlag.from_config(CONFIG)
    assert "int4_lora.integration.vllm_plugin.config" not in sys.modules


@pytest.fixture
def layer(one_rank):
    """Return one of vLLM's layers with vLLM's own scheme for INT4 weights."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    config = CompressedTensorsConfig.from_config(CONFIG)
    return ColumnParallelLinear(
        INPUTS,
        OUTPUTS,
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix=PREFIX,
    )


@pytest.fixture
def lora_config():
    from vllm.config.lora import LoRAConfig

    made = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, max_cpu_loras=SLOTS)
    made.lora_dtype = torch.bfloat16
    return made


def test_the_flag_is_known_after_the_entry_point():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from int4_lora.integration.vllm_plugin.entry import install
    from int4_lora.integration.vllm_plugin.flag import Int4LoRAFlag

    install()
    install()
    assert get_quantization_config("int4_lora") is Int4LoRAFlag
    made = Int4LoRAFlag.from_config(CONFIG)
    assert type(made).__name__ == "Int4LoRAConfig"


def test_int4_layers_have_the_scheme_and_tensors_that_are_taken_over(layer):
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )

    assert type(layer.scheme) is CompressedTensorsWNA16
    assert (layer.scheme.num_bits, layer.scheme.group_size, layer.scheme.symmetric) == (
        4,
        128,
        True,
    )
    assert layer.weight_packed.shape == (OUTPUTS, INPUTS // 8)
    assert layer.weight_packed.dtype == torch.int32
    assert layer.weight_scale.shape == (OUTPUTS, INPUTS // 128)
    assert layer.output_size_per_partition == OUTPUTS
    assert layer.input_size_per_partition == INPUTS
    assert (layer.tp_rank, layer.skip_bias_add, layer.bias) == (0, False, None)


def test_weights_are_loaded_through_the_loader_that_a_scheme_is_given(layer):
    """The loader that keeps the dtype of scales is put around this one."""
    given = torch.arange(OUTPUTS * INPUTS // 128).view(OUTPUTS, -1).bfloat16()
    layer.weight_scale.weight_loader(layer.weight_scale, given)
    assert torch.equal(layer.weight_scale.data, given)


def test_the_first_class_that_takes_a_layer_wraps_it(layer, lora_config, monkeypatch):
    import vllm.lora.utils as utils
    from vllm.lora.layers import ColumnParallelLinearWithLoRA

    class Ours(ColumnParallelLinearWithLoRA):
        pass

    monkeypatch.setattr(utils, "_all_lora_classes", (Ours, *utils._all_lora_classes))
    wrapped = utils.from_layer(layer, SLOTS, lora_config, [], None)
    assert type(wrapped) is Ours
    assert wrapped.base_layer is layer


def test_slots_are_laid_out_and_written_in_place(layer, lora_config):
    from vllm.lora.layers import ColumnParallelLinearWithLoRA

    wrapped = ColumnParallelLinearWithLoRA(layer)
    wrapped.create_lora_weights(SLOTS, lora_config, None)
    (a,), (b,) = wrapped.lora_a_stacked, wrapped.lora_b_stacked
    assert a.shape == (SLOTS, 1, RANK, INPUTS)
    assert b.shape == (SLOTS, 1, OUTPUTS, RANK)
    held = torch.zeros(SLOTS, RANK, OUTPUTS, dtype=b.dtype)  # B as the backend holds it
    wrapped.lora_b_stacked = (held.transpose(1, 2).unsqueeze(1),)
    lora_a = torch.randn(RANK - 3, INPUTS).bfloat16()
    lora_b = torch.randn(OUTPUTS, RANK - 3).bfloat16()
    wrapped.set_lora(1, lora_a, lora_b)
    assert torch.equal(a[1, 0, : RANK - 3], lora_a)
    assert torch.equal(held[1, : RANK - 3].T, lora_b)
    assert not held[0].any()
    wrapped.reset_lora(1)
    assert not held.any()


def test_a_token_without_an_adapter_has_the_slot_minus_one():
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    punica = PunicaWrapperCPU(16, 4, torch.device("cpu"))
    mapping = LoRAMapping(index_mapping=(7, 7, 0, 9), prompt_mapping=(7, 0, 9), is_prefill=True)
    punica.update_metadata(mapping, [9, 7], SLOTS, 512)
    assert punica._token_lora_indices[:4].tolist() == [1, 1, -1, 0]


def test_operators_for_cpus_add_to_rows_without_an_adapter_up_to_032():
    """Only there are those of embeddings and lm_head replaced."""
    from int4_lora.integration.vllm_plugin.vocabulary import adds_to_rows_without_an_adapter

    minor = tuple(int(part) for part in installed_version().split(".")[:2])
    assert adds_to_rows_without_an_adapter() == (minor <= (0, 32))


def test_the_flag_for_steps_without_adapters_is_on_the_cpu():
    """Only vLLM's operators for GPUs have it; their class of it needs none."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    meta = LoRAKernelMeta.make(SLOTS, 4, device="cpu")
    for ids, none in (([-1, -1], True), ([-1, 1], False)):
        meta.prepare_tensors(torch.tensor(ids))
        assert meta.no_lora_flag_cpu.device.type == "cpu"
        assert bool(meta.no_lora_flag_cpu.item()) == none


def test_what_is_changed_in_vllms_modules_is_listed():
    from int4_lora.integration.vllm_plugin.lora_layers import install_lora_layers

    install_lora_layers()
    changed = set()
    for module in [each for name, each in sys.modules.items() if name.split(".")[0] == "vllm"]:
        for name, value in list(vars(module).items()):
            if _is_of_the_plugin(value):
                changed.add(name)
            elif inspect.isclass(value) and value.__module__.startswith("vllm"):
                methods = [name for name, each in vars(value).items() if _is_of_the_plugin(each)]
                changed |= {f"{value.__name__}.{name}" for name in methods}
    table = PAGE.read_text().partition("In vLLM's modules")[2].partition("In the objects")[0]
    listed = set(re.findall(r"^\| `([\w.]+)`", table, flags=re.M))
    assert changed == listed - {"VLLM_CPU_INT4_W4A8"}  # which is changed for moments


def _is_of_the_plugin(value):
    """Return whether a function or a class is the plug-in's, or a tuple has one of its."""
    if isinstance(value, tuple):
        return any(map(_is_of_the_plugin, value))
    if inspect.isfunction(value):  # functools.wraps changes its __module__
        return "vllm_plugin" in Path(value.__code__.co_filename).parts
    return inspect.isclass(value) and value.__module__.startswith("int4_lora.")
