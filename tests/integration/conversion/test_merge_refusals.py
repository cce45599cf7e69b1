"""int4-lora merge: what it refuses, before and after it has computed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import Q_PROJ, edit_tensors
from support.conversion import convert, refusal, run
from support.tiny import LLAMA


def test_an_error_above_the_bar_is_refused_and_accepted_when_told(tiny_models, adapters, tmp_path):
    target, options = tmp_path / "merged", [f"--adapter={adapters[0]}", "--to=int4"]
    result = run("merge", tiny_models["g128"], target, *options, "--max-error=0.01", "--json")
    assert result.exit_code == 1
    assert "14 of 14 modules" in result.stderr
    assert json.loads(result.stdout)["report"]["total"]["relative_error"] > 0.01
    assert not target.exists()
    outcome = convert("merge", tiny_models["g128"], target, *options, "--max-error=0.5")
    assert outcome["written"] == []  # it was computed before
    refusal("merge", tiny_models["g128"], tmp_path / "a", *options, "--max-error=nan")


def test_bad_adapters_and_options(tiny_models, adapters, tmp_path):
    from int4_lora.integration.demo import recipe

    source, good = tiny_models["g32"], f"--adapter={adapters[0]}"
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    recipe.make_adapter(tmp_path / "wide", {**LLAMA, "hidden_size": 512}, "wide", settings)
    said = refusal("merge", source, tmp_path / "merged", f"--adapter={tmp_path / 'wide'}")
    assert "the adapter is for a weight of [512, 512], the base has [256, 256]" in said
    assert Q_PROJ in said
    recipe.make_adapter(tmp_path / "deep", {**LLAMA, "num_hidden_layers": 3}, "deep", settings)
    said = refusal("merge", source, tmp_path / "merged", f"--adapter={tmp_path / 'deep'}")
    assert "model.layers.2.self_attn.q_proj" in said
    assert "PATH=WEIGHT" in refusal("merge", source, tmp_path / "merged", f"{good}=x")
    assert "finite weight" in refusal("merge", source, tmp_path / "merged", f"{good}=inf")
    options = [good, "--to=int4", "--dtype=float16"]
    assert "dtype is of a dense" in refusal("merge", source, tmp_path / "merged", *options)
    inside = adapters[0] / "merged"
    result = run("merge", source, inside, good)
    assert result.exit_code == 2
    assert not inside.exists()
    spoilt = shutil.copytree(adapters[0], tmp_path / "spoilt")
    file = spoilt / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    assert "must be finite" in refusal("merge", source, tmp_path / "merged", f"--adapter={spoilt}")


def test_a_merged_weight_that_overflows_is_named(tiny_models, adapters, tmp_path):
    source = shutil.copytree(tiny_models["g32"], tmp_path / "source")
    edit_tensors(source, weight_scale=lambda scale: torch.full_like(scale, 8000).half())
    for options in ([], ["--to=int4"]):
        result = run(
            "merge", source, tmp_path / "merged", f"--adapter={adapters[0]}=1e12", *options
        )
        assert result.exit_code == 2
        assert Q_PROJ in result.stderr
        assert "finite in float16" in result.stderr
        assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_arguments_in_python_are_checked_first(tiny_models, adapters, tmp_path):
    from int4_lora.integration.conversion import merge_checkpoint

    source, target = tiny_models["g32"], tmp_path / "merged"
    for weight in (float("inf"), float("nan"), "x"):
        with pytest.raises(ValueError, match="finite number"):
            merge_checkpoint(source, target, [(adapters[0], weight)])
    with pytest.raises(ValueError, match="'int8'"):
        merge_checkpoint(source, target, [(adapters[0], 1.0)], to="int8")
    with pytest.raises(ValueError, match="float8"):
        merge_checkpoint(source, target, [(adapters[0], 1.0)], dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="at least one"):
        merge_checkpoint(source, target, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["dense", "int4"])
def test_a_group_that_is_not_there_is_refused_before_anything_is_written(
    tiny_models, adapters, tmp_path, to
):
    source = shutil.copytree(tiny_models["actorder-g128"], tmp_path / "source")
    edit_tensors(source, weight_g_idx=lambda g_idx: g_idx + 1)
    said = refusal("merge", source, tmp_path / "merged", f"--adapter={adapters[0]}", f"--to={to}")
    assert Q_PROJ in said
    assert "g_idx must be in [-1, 2), the groups of scale, got 2" in said
