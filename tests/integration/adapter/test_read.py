"""read_adapter and stack_adapters, on adapters that PEFT saved."""

import json
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import read_adapter, stack_adapters
from support.adapter_files import keyed, write_folder

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


def test_peft_sorts_patterns_so_that_training_may_have_had_another_alpha(tmp_path):
    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    patterns = {r"\d": 5, r"1": 7}
    config = peft.LoraConfig(
        r=2, target_modules=["0", "1"], init_lora_weights=False, alpha_pattern=patterns
    )
    trained = peft.get_peft_model(Base(), config)
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Base(), tmp_path)
    adapter = read_adapter(tmp_path)
    for name, module in adapter.modules.items():
        scaling = loaded.base_model.model.get_submodule(name).scaling["default"]
        assert module.scaling == scaling
    in_training = trained.base_model.model.layers[1].scaling["default"]
    assert adapter.modules["layers.1"].scaling != in_training == 2.5
    (note,) = adapter.notes
    assert note.startswith(
        r"alpha_pattern: '1' and '\\d' match layers.1; the first counts, as when"
    )
    edit_config(tmp_path, alpha_pattern=patterns)
    assert read_adapter(tmp_path).notes == ()


def test_a_config_that_peft_did_not_write_has_its_own_order(tmp_path):
    patterns = {"layers.0.self_attn.q_proj": 7, "q_proj": 5}
    adapter = read_adapter(write_folder(tmp_path / "adapter", keyed(), alpha_pattern=patterns))
    assert adapter.modules["model.layers.0.self_attn.q_proj"].scaling == 3.5
    assert adapter.notes == ()


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
        ("use_dora = True is not plain LoRA: DoRA also scales", {"use_dora": True}),
        (r"modules_to_save = \['lm_head'\], and no tensor of", {"modules_to_save": ["lm_head"]}),
        (r"modules_to_save: '\(' is no regular expression", {"modules_to_save": ["("]}),
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
        (r"layers_pattern: '\(\?P<idx>h\)' is no regular", {"layers_pattern": ["(?P<idx>h)"]}),
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


def test_a_matrix_of_an_embedding_that_is_missing_is_called_by_its_name(tmp_path):
    key = "base_model.model.model.embed_tokens.lora_embedding_B"
    folder = write_folder(tmp_path / "x", {key: torch.ones(8, 2)}, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="embed_tokens: lora_embedding_A is missing"):
        read_adapter(folder)


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


def test_a_layer_that_the_config_does_not_target_is_refused(copied):
    edit_config(copied, layers_to_transform=[0, 1, 2])
    with pytest.raises(ValueError, match=r"layers\.3\..* does not target it, so that PEFT would"):
        read_adapter(copied)


EXPERTS = "model.layers.{}.mlp.experts.{}.up_proj"


def experts(folder, layers, **settings):
    """Write and read an adapter of some experts, with layers_to_transform = [1]."""
    modules = {
        EXPERTS.format(layer, expert): (torch.ones(2, 4), torch.ones(6, 2))
        for layer, expert in layers
    }
    settings = {"target_modules": ["up_proj"], "layers_to_transform": [1], **settings}
    return read_adapter(write_folder(folder, keyed(modules=modules), **settings))


FIRST_COUNTS = [(1, 0), (1, 1), (1, 2)]  # PEFT 0.20 and newer take the first number
LAST_COUNTS = [(0, 1), (1, 1), (2, 1)]  # PEFT before 0.20 takes the last


@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        (FIRST_COUNTS, {"peft_version": "0.21.2"}),
        (FIRST_COUNTS, {"peft_version": "0.20.0"}),
        (FIRST_COUNTS, {}),
        (FIRST_COUNTS, {"peft_version": "0.19.1", "layers_pattern": "layers"}),
        ([(1, 1)], {"peft_version": "0.19.1"}),
        ([(1, 1)], {}),
    ],
)
def test_layers_to_transform_counts_layers(tmp_path, layers, settings):
    adapter = experts(tmp_path / "adapter", layers, **settings)
    assert adapter.modules.keys() == {EXPERTS.format(*numbers) for numbers in layers}
    assert adapter.notes == ()


@pytest.mark.parametrize("version", ["0.19.1", None, "0.19.1.dev0"])
def test_layers_to_transform_of_an_older_peft_counts_experts(tmp_path, version):
    adapter = experts(tmp_path / "adapter", LAST_COUNTS, peft_version=version)
    assert adapter.modules.keys() == {EXPERTS.format(*numbers) for numbers in LAST_COUNTS}
    assert adapter.notes == (
        "layers_to_transform counts layers as PEFT before 0.20 does; PEFT 0.21 and newer would "
        "ignore 2 of the adapter's 3 modules",
    )


@pytest.mark.parametrize(
    ("layers", "version", "number"),
    [
        (LAST_COUNTS, "0.21.2", r"0 \(PEFT 0.21 and newer\), 0 \(PEFT 0.20\), 1 \(PEFT before"),
        (FIRST_COUNTS, "0.18.1", r"1 \(PEFT 0.21 and newer\), 1 \(PEFT 0.20\), 0 \(PEFT before"),
        (FIRST_COUNTS + LAST_COUNTS, None, r"0 \(PEFT 0.21 and newer\), 0 .*, 1 \(PEFT before"),
    ],
)
def test_layers_that_no_count_explains_are_refused_with_each(tmp_path, layers, version, number):
    with pytest.raises(ValueError, match=rf"does not target it.* layer's number is {number}"):
        experts(tmp_path / "adapter", layers, peft_version=version)
