"""int4-lora inspect: what a checkpoint holds, special scales, and adapters that fit or do not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.cli.app import app
from support.checkpoints import Q_PROJ, edit_config, edit_tensors, shard, weights
from support.tiny import VARIANTS


def run(*arguments):
    command = ["inspect", *(str(one) for one in arguments)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "160"})


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_described_as_its_tensors_are(tiny_models, variant):
    result = run(tiny_models[variant], "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["modules"]) == 14
    checkpoint = open_checkpoint(tiny_models[variant])
    for module in found["modules"]:
        weight = checkpoint.packed_weight(module["name"])
        assert module["nbytes"] == weight.nbytes
        assert module["bf16_bytes"] == 2 * weight.in_features * weight.out_features
        assert module["shape"] == list(weight.shape)
        assert module["symmetric"] == weight.symmetric
        assert module["strategy"] == weight.strategy
        assert module["g_idx"] == (variant == "actorder-g128")
        assert (module["scale_dtype"], module["format"]) == ("BF16", "pack-quantized")
        assert (module["nan_scales"], module["infinite_scales"], module["zero_scales"]) == (0, 0, 0)
    assert found["lora_targets"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    size = sum(file.stat().st_size for file in tiny_models[variant].glob("*.safetensors"))
    listed = found["dense_bytes"] + sum(module["nbytes"] + 16 for module in found["modules"])
    assert 0 < size - listed < 8000  # what is left is the header


def test_the_table_folds_layers(tiny_models):
    folded = run(tiny_models["asym-g32"]).output
    assert "model.layers.*.self_attn.q_proj x2" in folded
    assert "4 bit, group 32, asymmetric" in folded
    assert "14 quantised modules" in folded
    assert run(tiny_models["asym-g32"], "--all").output.count("4 bit") == 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_special_scales_are_counted(copied_model, dtype):
    def spoil(scale):
        scale = scale.to(dtype).flatten()
        scale[:2], scale[2:5], scale[5:9], scale[9] = (
            float("nan"),
            -float("inf"),
            -0.0,
            float("inf"),
        )
        return scale.reshape(256, 8)

    edit_tensors(copied_model, weight_scale=spoil)
    result = run(copied_model, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["right"]
    (module,) = [one for one in found["modules"] if one["name"] == Q_PROJ]
    assert [module[f"{kind}_scales"] for kind in ("nan", "infinite", "zero")] == [2, 4, 4]
    assert "2, 4, 4" in run(copied_model).output


def test_zero_scales_alone_are_not_wrong(copied_model):
    edit_tensors(copied_model, weight_scale=torch.zeros_like)
    assert run(copied_model).exit_code == 0


def test_adapters(tiny_models, tiny_adapters, demo_files):
    result = run(tiny_models["g32"], "--adapter", tiny_adapters["b"], "--json")
    assert result.exit_code == 0
    (adapter,) = json.loads(result.stdout)["adapters"]
    assert (adapter["ranks"], adapter["scalings"], adapter["fault"]) == ([12], [2 / 3], None)
    assert adapter["targets"]["q_proj"] == 2
    result = run(tiny_models["g32"], "--adapter", demo_files.adapters["a"])
    assert result.exit_code == 1
    assert "does not fit" in result.output
    assert "weight of [512, 512]" in " ".join(result.output.split())


def test_other_formats_are_listed(copied_model):
    edit_config(
        copied_model, lambda _, q: q["config_groups"]["group_0"].update(format="float-quantized")
    )
    found = json.loads(run(copied_model, "--json").stdout)
    assert {module["format"] for module in found["modules"]} == {"float-quantized"}
    assert found["lora_targets"] == []


def test_a_sharded_model(copied_model, tiny_models):
    shard(copied_model)
    ours, theirs = (json.loads(run(one, "--json").stdout) for one in
                    (copied_model, tiny_models["asym-g32"]))  # fmt: skip
    assert sorted(ours["modules"], key=str) == sorted(theirs["modules"], key=str)


def test_refuses(tmp_path, copied_model):
    missing = run(tmp_path / "nowhere")
    assert missing.exit_code == 2
    assert "is not a folder with a checkpoint" in missing.output
    broken = shutil.copytree(copied_model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors[f"{Q_PROJ}.weight_scale"]
    save_file(tensors, broken / "model.safetensors")
    result = run(broken)
    assert result.exit_code == 2
    assert f"{Q_PROJ}: weight_scale of a quantised module is missing" in result.output
    edit_config(copied_model, weights(strategy="nonsense"))
    assert run(copied_model).exit_code == 2


@pytest.mark.parametrize(
    ("message", "spoil"),
    [
        ("packed must be", {"weight_shape": lambda _: torch.tensor([4, 10**12])}),
        ("scale must be", {"weight_scale": lambda scale: scale[1:]}),
        ("scale must be float16", {"weight_scale": lambda scale: scale.double()}),
        ("zero_point must be", {"weight_zero_point": lambda zero_point: zero_point[:, 1:]}),
        ("packed must be", {"weight_packed": lambda packed: packed[:, 1:]}),
    ],
)
def test_headers_that_contradict_each_other_are_refused_without_values(
    copied_model, monkeypatch, message, spoil
):
    edit_tensors(copied_model, **spoil)
    read = Checkpoint.tensor

    def reading(checkpoint, name):
        assert not name.startswith(Q_PROJ) or name.endswith("weight_shape")
        return read(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "tensor", reading)
    result = run(copied_model)
    assert result.exit_code == 2, result.output
    assert Q_PROJ in result.output
    assert message in result.output


def test_the_configs_group_size_must_be_the_tensors(copied_model):
    edit_config(copied_model, weights(group_size=64))
    result = run(copied_model)
    assert result.exit_code == 2
    assert "group_size must be in_features / groups = 512 / 16, got 64" in result.output


def test_brackets_in_names_are_text(copied_model):
    odd = shutil.copytree(copied_model, copied_model.parent / "x[red]" / "y]")
    tensors = load_file(odd / "model.safetensors")
    renamed = {name.replace(Q_PROJ, "model.[/red].q"): value for name, value in tensors.items()}
    save_file(renamed, odd / "model.safetensors")
    result = run(odd, "--all")
    assert result.exit_code == 0, result.output
    assert "model.[/red].q" in result.output


def test_an_adapter_does_not_fit_what_is_not_int4(copied_model, tiny_adapters):
    edit_config(copied_model, lambda c, q: q["config_groups"]["group_0"].update(format="dense"))
    result = run(copied_model, f"--adapter={tiny_adapters['a']}", "--json")
    assert result.exit_code == 1
    (adapter,) = json.loads(result.stdout)["adapters"]
    assert "is no INT4 module" in adapter["fault"]
    assert "base" in adapter


def test_a_g_idx_of_minus_one_is_no_order(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["actorder-g128"], tmp_path / "copied")
    edit_tensors(folder, weight_g_idx=lambda g_idx: torch.full_like(g_idx, -1))
    found = json.loads(run(folder, "--json").stdout)["modules"]
    assert {one["name"] for one in found if not one["g_idx"]} == {Q_PROJ}
    edit_tensors(folder, weight_g_idx=lambda g_idx: g_idx.float())
    result = run(folder)
    assert result.exit_code == 2
    assert "g_idx must be int32" in result.output
