"""read_adapter and stack_adapters, on adapters that PEFT saved."""

import json
import math
import shlex
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from int4_lora.integration import read_adapter, stack_adapters
from int4_lora.integration.adapter.config import is_targeted
from support.adapters import assert_equal

pytestmark = pytest.mark.versions

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


def test_a_pattern_matches_whole_parts_of_a_name(copied):
    edit_config(copied, alpha_pattern={"proj": 1, "_proj": 1, "attn.q_proj": 1})
    assert {module.scaling for module in read_adapter(copied).modules.values()} == {2.0}


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
        (r"modules_to_save = \['lm_head'\], and no tensor of", {"modules_to_save": ["lm_head"]}),
        ("trainable_token_indices is set, and no rows", {"trainable_token_indices": [3]}),
        ("lora_bias = True is not plain LoRA", {"lora_bias": True}),
        ("fan_in_fan_out = True is not plain LoRA", {"fan_in_fan_out": True}),
        ("use_rslora must be true or false, got 'false'", {"use_rslora": "false"}),
        ("init_lora_weights = 'pissa_niter_4' changes", {"init_lora_weights": "pissa_niter_4"}),
        ("lora_alpha must be a finite number", {"lora_alpha": 10**400}),
        ("layers_to_transform must be an int or ints, got ''", {"layers_to_transform": ""}),
        ("target_modules must be a string or strings, got {}", {"target_modules": {}}),
        ("bias must be 'none', got 'all'", {"bias": "all"}),
        ("r must be a positive whole number, got None", {"r": None}),
        ("r must be a positive whole number, got 0", {"r": 0}),
        ("r must be a positive whole number, got True", {"r": True}),
        ("lora_alpha must be a finite number, got 'x'", {"lora_alpha": "x"}),
        ("lora_alpha must be a finite number, got nan", {"lora_alpha": float("nan")}),
        (r"rank_pattern\['q'\] must be a positive whole number", {"rank_pattern": {"q": "8"}}),
        (r"alpha_pattern\['\('\]: '\(' is no regular expression", {"alpha_pattern": {"(": 1}}),
        ("rank_pattern must be an object", {"rank_pattern": [1]}),
        (r"rank_pattern\['\(\?i\)q'\]: .* is no regular", {"rank_pattern": {"(?i)q": 8}}),
        (r"layers_pattern: '\(' is no regular expression", {"layers_pattern": "("}),
        (r"layers_pattern: '\(h\|layers\)' must have no", {"layers_pattern": ["(h|layers)"]}),
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


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_that_leave_the_folder_are_refused(copied, tmp_path, name):
    (copied / name).rename(tmp_path / "elsewhere")
    (copied / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is a link that leaves the folder"):
        read_adapter(copied)


def test_refuses_files(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder with an adapter"):
        read_adapter(tmp_path / "nowhere")
    tensors = copied / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_adapter(copied)
    tensors.rename(copied / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"is a pickle, .* convert it there with: python -c"):
        read_adapter(copied)
    (copied / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is not there"):
        read_adapter(copied)


def test_the_conversion_that_a_pickle_is_refused_with_works(demo_files, copied, monkeypatch):
    tensors = load_file(copied / "adapter_model.safetensors")
    (copied / "adapter_model.safetensors").unlink()
    torch.save(tensors, copied / "adapter_model.bin")
    with pytest.raises(ValueError, match="is a pickle") as refused:
        read_adapter(copied)
    command = shlex.split(str(refused.value).rpartition("with: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=copied, check=True)
    same = read_adapter(demo_files.adapters["a"])
    assert_equal(read_adapter(copied).modules, same.modules)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_keys_as_other_tools_write_them(demo_files, copied, rename):
    edit_tensors(
        copied, lambda tensors: [tensors.update({rename(k): tensors.pop(k)}) for k in list(tensors)]
    )
    same = read_adapter(demo_files.adapters["a"])
    assert_equal(read_adapter(copied).modules, same.modules)


TARGETING = [
    {"target_modules": ["q_proj"]},
    {"target_modules": r".*\.mlp\.(up|down)_proj"},
    {
        "target_modules": ["q_proj", "layers.1.mlp.up_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    {"target_modules": r".*_proj", "exclude_modules": r".*\.layers\.0\..*"},
    {"target_modules": ["v_proj", "k_proj"], "layers_to_transform": [1, 3]},
    {"target_modules": ["v_proj"], "layers_to_transform": 0},
    {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {
        "target_modules": ["v_proj"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["h", "layers"],
    },
    {"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "h"},
    {"target_modules": ["proj"]},
]


@pytest.mark.parametrize("settings", TARGETING)
def test_targets_what_peft_targets(settings):
    config = peft.LoraConfig(**settings)
    for layer in range(4):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj",
                     "mlp.down_proj"):  # fmt: skip
            name = f"model.layers.{layer}.{part}"
            theirs = bool(check_target_module_exists(config, name))
            assert is_targeted(settings, name) == theirs, (name, settings)


def test_a_layer_that_the_config_does_not_target_is_refused(copied):
    edit_config(copied, layers_to_transform=[0, 1, 2])
    with pytest.raises(ValueError, match=r"layers\.3\..* does not target it, so PEFT would"):
        read_adapter(copied)
