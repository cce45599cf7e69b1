"""read_adapter and stack_adapters, on adapters that PEFT saved."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import read_adapter, stack_adapters

Q_PROJ = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q_PROJ}.lora_A.weight"


@pytest.fixture
def copied(demo_files, tmp_path):
    return shutil.copytree(demo_files.adapters["a"], tmp_path / "adapter")


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_ranks_targets_and_scalings(demo_files):
    a, b, c = (read_adapter(demo_files.adapters[name]) for name in "abc")
    assert {name.rpartition(".")[2] for name in a.modules} == {"q_proj", "v_proj"}
    assert len(b.modules) == 4 * 7
    assert {name.rpartition(".")[2] for name in c.modules} == {"gate_proj", "up_proj", "down_proj"}
    assert {module.scaling for module in a.modules.values()} == {2.0}
    assert {module.scaling for module in b.modules.values()} == {2 / 3}
    assert {module.scaling for module in c.modules.values()} == {5 / math.sqrt(5)}
    assert [next(iter(one.modules.values())).a.shape[0] for one in (a, b, c)] == [8, 12, 5]


def test_patterns_choose_rank_and_alpha_by_the_end_of_the_name(copied):
    edit_config(
        copied,
        rank_pattern={"v_proj": 8, r"layers\.1\.self_attn\.q_proj": 8},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 4, "q_proj": 6, "proj": 100},
        r=3,
    )
    edit_tensors(
        copied, lambda tensors: keep(tensors, lambda key: "layers.1.self_attn.q_proj" in key)
    )
    (module,) = read_adapter(copied).modules.values()
    assert module.scaling == 4 / 8


def keep(tensors, wanted):
    for key in [key for key in tensors if not wanted(key)]:
        del tensors[key]


def test_stacking_for_a_whole_model(demo_files):
    adapters = [read_adapter(demo_files.adapters[name]) for name in "abc"]
    stack = stack_adapters(adapters, Q_PROJ, 512, 512)
    assert (stack.adapters, stack.rank) == (3, 12)
    assert stack.scaling.tolist() == [2.0, 2 / 3, 0.0]
    assert torch.equal(stack.a[0, :8], adapters[0].modules[Q_PROJ].a)
    assert (stack.b[2] == 0).all()
    assert stack_adapters(adapters[:1], "model.layers.0.mlp.up_proj", 512, 1408) is None


def test_stacking_widens_without_rounding(demo_files, copied):
    edit_tensors(
        copied, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()})
    )
    narrow, wide = read_adapter(copied), read_adapter(demo_files.adapters["b"])
    assert narrow.modules[Q_PROJ].a.dtype == torch.bfloat16
    stack = stack_adapters([narrow, wide], Q_PROJ, 512, 512)
    assert stack.a.dtype == torch.float32
    assert torch.equal(stack.a[0, :8].bfloat16(), narrow.modules[Q_PROJ].a)


def test_an_adapter_of_another_base_is_refused(demo_files):
    adapter = read_adapter(demo_files.adapters["a"])
    message = rf"{Q_PROJ}: the adapter is for a weight of \[512, 512\], the base has \[512, 256\]"
    with pytest.raises(ValueError, match=message):
        stack_adapters([adapter], Q_PROJ, 256, 512)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("peft_type must be 'LORA', got 'LOHA'", {"peft_type": "LOHA"}),
        ("use_dora = True is not plain LoRA", {"use_dora": True}),
        (r"modules_to_save = \['lm_head'\] is not plain LoRA", {"modules_to_save": ["lm_head"]}),
        ("lora_bias = True is not plain LoRA", {"lora_bias": True}),
        ("fan_in_fan_out = True is not plain LoRA", {"fan_in_fan_out": True}),
        ("bias must be 'none', got 'all'", {"bias": "all"}),
        ("r must be a positive whole number, got None", {"r": None}),
        ("r must be a positive whole number, got 0", {"r": 0}),
        ("r must be a positive whole number, got True", {"r": True}),
        ("lora_alpha must be a finite number, got 'x'", {"lora_alpha": "x"}),
        ("lora_alpha must be a finite number, got nan", {"lora_alpha": float("nan")}),
        (r"rank_pattern\['q'\] must be a positive whole number", {"rank_pattern": {"q": "8"}}),
        (r"alpha_pattern\['\('\]: missing \)", {"alpha_pattern": {"(": 1}}),
        ("rank_pattern must be an object", {"rank_pattern": [1]}),
        (r"lora_A must be \[4, in_features\] .* got \[8, 512\]", {"r": 4}),
    ],
)
def test_refuses_configs(copied, message, changes):
    edit_config(copied, **changes)
    with pytest.raises(ValueError, match=message):
        read_adapter(copied)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, f"{Q_PROJ}: lora_A is missing", lambda t: t.pop(KEY)),
        (ValueError, "holds no lora_A", lambda t: t.clear()),
        (
            ValueError,
            "is not lora_A or lora_B of a linear",
            lambda t: t.update(other=t[KEY].clone()),
        ),
        (TypeError, f"{Q_PROJ}: .* must be float", lambda t: t.update({KEY: t[KEY].int()})),
        (ValueError, f"{Q_PROJ}: .* got .8, 512, 1", lambda t: t.update({KEY: t[KEY][..., None]})),
    ],
)
def test_refuses_tensors(copied, error, message, change):
    edit_tensors(copied, change)
    with pytest.raises(error, match=message):
        read_adapter(copied)


def test_refuses_files(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder with an adapter"):
        read_adapter(tmp_path / "nowhere")
    tensors = copied / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_adapter(copied)
    tensors.rename(copied / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which is not opened"):
        read_adapter(copied)
