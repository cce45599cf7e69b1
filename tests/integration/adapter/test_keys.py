"""What the keys of an adapter's file are: prefixes, adapters' names, and the parts of wrappers."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from int4_lora.integration import read_adapter
from support.adapter_files import DOWN_PROJ, Q_PROJ, keyed, pairs, write_folder

PLAIN = "base_model.model.{module}.lora_{matrix}.weight"
LEFT_OUT = {
    "_orig_mod": "_orig_mod, which torch.compile adds to names, is left out of the adapter's keys",
    "_fsdp_wrapped_module": "_fsdp_wrapped_module, which FSDP adds to names, is left out of the "
    "adapter's keys",
    "module": "module, which DistributedDataParallel adds to names, is left out of the adapter's "
    "keys",
}


def read_with(tmp_path, key, **settings):
    return read_adapter(write_folder(tmp_path / "adapter", keyed(key), **settings))


def assert_is_the_pair(adapter):
    assert adapter.modules.keys() == {Q_PROJ, DOWN_PROJ}
    for name, (a, b) in pairs().items():
        module = adapter.modules[name]
        assert torch.equal(module.a, a)
        assert torch.equal(module.b, b)
        assert module.scaling == 1.5


@pytest.mark.parametrize(
    ("key", "notes"),
    [
        (PLAIN, []),
        ("{module}.lora_{matrix}.weight", []),
        ("base_model.model.{module}.lora_{matrix}.default.weight", []),
        ("base_model.model.{module}.lora_{matrix}.sql.weight", []),
        ("{module}.lora_{matrix}.sql_2-b.weight", []),
        (f"_orig_mod.{PLAIN}", ["_orig_mod"]),
        ("base_model.model._orig_mod.{module}.lora_{matrix}.weight", ["_orig_mod"]),
        (f"_fsdp_wrapped_module.{PLAIN}", ["_fsdp_wrapped_module"]),
        (f"module.{PLAIN}", ["module"]),
        (f"module._orig_mod.{PLAIN}", ["_orig_mod", "module"]),
        (
            "base_model.model.{module}.lora_{matrix}.default._fsdp_wrapped_module.weight",
            ["_fsdp_wrapped_module"],
        ),
    ],
)
def test_keys_that_mean_the_same_pair(tmp_path, key, notes):
    adapter = read_with(tmp_path, key)
    assert_is_the_pair(adapter)
    assert adapter.notes == tuple(LEFT_OUT[part] for part in notes)


def test_a_module_may_be_called_module(tmp_path):
    adapter = read_with(tmp_path, "base_model.model.module.{module}.lora_{matrix}.weight")
    assert adapter.modules.keys() == {f"module.{Q_PROJ}", f"module.{DOWN_PROJ}"}
    adapter = read_with(tmp_path, "module.{module}.lora_{matrix}.weight")
    assert adapter.modules.keys() == {f"module.{Q_PROJ}", f"module.{DOWN_PROJ}"}


def test_a_prefix_that_stands_twice_is_kept_once(tmp_path):
    """PEFT wrapped a model that it had wrapped: of which base, the user must say (``--rename``)."""
    adapter = read_with(tmp_path, f"base_model.model.{PLAIN}")
    assert adapter.modules.keys() == {f"base_model.model.{name}" for name in (Q_PROJ, DOWN_PROJ)}


BLOCKS = r"blocks\.\d\.0"


class Toy(nn.Module):
    """Two blocks of one layer."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def adapted_toy():
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=2, target_modules=BLOCKS, init_lora_weights=False, rank_pattern={"^blocks.1.0": 3}
    )
    return peft.get_peft_model(Toy(), config)


def state_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if "lora_" in key}


def wrapped_by_torch_compile(model):
    return torch.compile(model)


def wrapped_inside_by_torch_compile(model):
    model.base_model.model = torch.compile(model.base_model.model)
    return model


def wrapped_by_data_parallel(model):
    return nn.DataParallel(model)


def wrapped_by_activation_checkpointing(model):
    blocks = model.base_model.model.blocks
    for number in range(2):
        blocks[number][0] = checkpoint_wrapper(blocks[number][0])
    return model


@pytest.mark.versions
@pytest.mark.parametrize(
    "wrap",
    [
        wrapped_by_torch_compile,
        wrapped_inside_by_torch_compile,
        wrapped_by_data_parallel,
        wrapped_by_activation_checkpointing,
    ],
)
def test_the_state_of_a_wrapped_model_is_read_as_that_of_the_model(tmp_path, wrap):
    model = adapted_toy()
    plain = state_of(model)
    state = state_of(wrap(copy.deepcopy(model)))
    settings = {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": BLOCKS,
        "rank_pattern": {"^blocks.1.0": 3},
    }
    adapter = read_adapter(write_folder(tmp_path / "wrapped", state, **settings))
    assert adapter.modules.keys() == {"blocks.0.0", "blocks.1.0"}
    for name, module in adapter.modules.items():
        key = f"base_model.model.{name}.lora_{{}}.default.weight"
        assert torch.equal(module.a, plain[key.format("A")])
        assert torch.equal(module.b, plain[key.format("B")])
        layer = model.base_model.model.get_submodule(name)
        assert module.scaling == layer.scaling["default"]


def test_names_that_the_wrapper_changes_for_a_pattern_are_refused(tmp_path):
    key = "base_model.model._orig_mod.{module}.lora_{matrix}.weight"
    with pytest.raises(
        ValueError, match=r"scaling by the config are 2 and (1.5|2.5) for .*, or 2 "
    ):
        read_with(tmp_path, key, alpha_pattern={"^model.layers.0.self_attn.q_proj": 5})


def test_a_config_may_target_the_wrapped_names(tmp_path):
    key = "base_model.model._orig_mod.{module}.lora_{matrix}.weight"
    adapter = read_with(tmp_path, key, target_modules=r"_orig_mod\..*_proj")
    assert_is_the_pair(adapter)


def refused(tmp_path, message, tensors, error=ValueError, **settings):
    with pytest.raises(error, match=message):
        read_adapter(write_folder(tmp_path / "adapter", tensors, **settings))


def test_several_adapters_in_one_file_are_listed(tmp_path):
    tensors = keyed("base_model.model.{module}.lora_{matrix}.sql.weight")
    other = {name: pair for name, pair in pairs().items() if name == Q_PROJ}
    for name, listed in (("math", "math"), (None, "no name")):
        part = f".{name}" if name else ""
        more = keyed(f"base_model.model.{{module}}.lora_{{matrix}}{part}.weight", other)
        refused(
            tmp_path,
            rf"several adapters: (sql \(.*\), {listed}|{listed} \(.*\), sql) \(",
            tensors | more,
        )


def test_peft_saves_one_of_several_adapters_as_the_refusal_says(tmp_path):
    model = adapted_toy()
    model.add_adapter("sql", peft.LoraConfig(r=2, target_modules=BLOCKS, init_lora_weights=False))
    model.save_pretrained(tmp_path, selected_adapters=["sql"])
    assert read_adapter(tmp_path / "sql").modules.keys() == {"blocks.0.0", "blocks.1.0"}
    with pytest.raises(FileNotFoundError, match="is not there, but in sql there is one"):
        read_adapter(tmp_path)


def test_two_keys_of_one_matrix_are_refused(tmp_path):
    tensors = keyed() | keyed("_orig_mod.base_model.model.{module}.lora_{matrix}.weight")
    refused(tmp_path, "means the same tensor as", tensors)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.q_proj.lora_magnitude_vector", "it belongs to DoRA"),
        ("base_model.model.q_proj.lora_diag", "it belongs to KaSA"),
        ("base_model.model.q_proj.lora_B.bias", r"B has a bias \(lora_bias\)"),
        ("base_model.model.q_proj.lora_C.weight", "a variant of LoRA"),
        ("base_model.model.q_proj.alpha", "put lora_alpha or alpha_pattern into"),
        ("other", "its kind is unknown"),
    ],
)
def test_other_tensors_are_refused(tmp_path, key, message):
    refused(tmp_path, message, keyed() | {key: torch.ones(2)})


@pytest.mark.parametrize("shape", [[0], [64], [0, 4]])
def test_tensors_that_were_not_gathered_are_refused_with_the_cause(tmp_path, shape):
    key = PLAIN.format(module=Q_PROJ, matrix="A")
    message = r"lora_A has the shape .*: DeepSpeed ZeRO-3 and FSDP leave such tensors where a"
    refused(tmp_path, message, keyed() | {key: torch.zeros(shape)})


@pytest.mark.parametrize("shape", [[0], [0, 4]])
def test_whole_tensors_that_were_not_gathered_are_refused_with_the_cause(tmp_path, shape):
    tensors = keyed() | {"base_model.model.lm_head.weight": torch.zeros(shape)}
    message = r"lm_head.weight has the shape .*: DeepSpeed ZeRO-3 and FSDP leave such tensors"
    refused(tmp_path, message, tensors, modules_to_save=["lm_head"])


WIDENED = [
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16, torch.float32),
    (torch.float64, torch.float32, torch.float64),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(("a", "b", "wide"), WIDENED)
def test_a_pair_of_two_dtypes_is_widened_without_rounding(tmp_path, a, b, wide):
    modules = {name: (first.to(a), second.to(b)) for name, (first, second) in pairs().items()}
    adapter = read_adapter(write_folder(tmp_path / "adapter", keyed(modules=modules)))
    for name, (first, second) in modules.items():
        module = adapter.modules[name]
        assert module.a.dtype == module.b.dtype == wide
        assert torch.equal(module.a.double(), first.double())
        assert torch.equal(module.b.double(), second.double())
