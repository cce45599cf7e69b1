"""Adapters merged into NVFP4 and MXFP4, whose error is reported."""

import json
import re
import shutil

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from int4_lora.integration import open_checkpoint, read_adapter
from int4_lora.integration.conversion import merge_checkpoint
from int4_lora.reference import dequantize
from support.checkpoints import Q_PROJ, edit_config, edit_tensors
from support.conversion import tensors_of
from support.float4_checkpoints import make_float4

FORMATS = ("nvfp4", "mxfp4")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of a tiny FP4 Llama of each format, by name."""
    root = tmp_path_factory.mktemp("float4")
    return {name: make_float4(root / name, name) for name in FORMATS}


def merged_weight(checkpoint, adapter, module, factor):
    """Return W + factor * scaling * B A in float64, written out."""
    pair = adapter.modules[module]
    exact = dequantize(checkpoint.float4_weight(module), torch.float64)
    return exact + factor * pair.scaling * (pair.b.double() @ pair.a.double())


def quantised_by_upstream(exact, name, over):
    """Return what compressed-tensors makes of a weight with its min-max scales, in float64."""
    arguments = preset_name_to_scheme(f"{name.upper()}A16", ["Linear"]).weights
    dense = exact.float()
    groups = dense.unflatten(1, (-1, arguments.group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, over)
    return fake_quantize(dense, scale, zero, arguments, global_scale=over).double()


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_reported_and_no_worse_than_upstreams(models, tiny_adapters, tmp_path, name):
    source, path = models[name], tiny_adapters["a"]
    lost = {}
    for search in (True, False):
        outcome = merge_checkpoint(
            source, tmp_path / f"{search}", [(path, 0.5)], to=name, search=search
        )
        base, after = open_checkpoint(source), open_checkpoint(tmp_path / f"{search}")
        adapter, changed = read_adapter(path), []
        for entry in outcome.report["modules"]:
            module = entry["module"]
            exact = merged_weight(base, adapter, module, 0.5)
            weight = after.float4_weight(module)
            off = dequantize(weight, torch.float64) - exact
            relative = (off.norm() / exact.norm()).item()
            assert entry["relative_error"] == pytest.approx(relative, rel=1e-9)
            assert entry["max_error"] == pytest.approx(off.abs().max().item(), rel=1e-9)
            assert entry["relative_error"] <= entry["relative_error_minmax"]
            changed.append(module)
            lost[search] = lost.get(search, 0.0) + off.square().sum().item()
            over = weight.global_scale
            if not search and (name == "mxfp4" or torch.equal(over, _over(base, module))):
                theirs = quantised_by_upstream(exact, name, over) - exact
                assert off.square().sum() <= 1.001 * theirs.square().sum()
    assert sorted(changed) == sorted(set(adapter.modules) & set(base.schemes))
    assert lost[True] < lost[False]
    before, after = tensors_of(source), tensors_of(tmp_path / "True")
    assert {key: one.dtype for key, one in before.items()} == {
        key: one.dtype for key, one in after.items()
    }
    for key, one in before.items():
        if key.rpartition(".")[0] not in adapter.modules:
            assert torch.equal(one.view(torch.uint8), after[key].view(torch.uint8)), key
    assert (tmp_path / "True/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert json.loads((tmp_path / "True/merge_report.json").read_text())["scales"] == "search"


def _over(checkpoint, module):
    return checkpoint.float4_weight(module).global_scale


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_that_did_not_change_keeps_its_values(models, tiny_adapters, tmp_path, name):
    outcome = merge_checkpoint(
        models[name], tmp_path / "same", [(tiny_adapters["a"], 0.0)], to=name
    )
    assert outcome.report["total"]["relative_error"] == 0
    before, after = open_checkpoint(models[name]), open_checkpoint(tmp_path / "same")
    for module in before.modules():
        one, other = before.float4_weight(module), after.float4_weight(module)
        assert torch.equal(dequantize(one), dequantize(other))


def test_a_global_scale_that_is_too_large_gives_way(models, tiny_adapters, tmp_path):
    """It stays as long as the scale of the largest weight rounds to E4M3, up to 464."""
    base, adapter = open_checkpoint(models["nvfp4"]), read_adapter(tiny_adapters["a"])
    kept = {}
    for factor in (1e-3, 300.0):
        target = tmp_path / f"{factor}"
        merge_checkpoint(
            models["nvfp4"], target, [(tiny_adapters["a"], factor)], to="nvfp4", max_error=1.0
        )
        after = open_checkpoint(target)
        for module in set(adapter.modules) & set(base.schemes):
            exact, over = merged_weight(base, adapter, module, factor), _over(after, module)
            largest = exact.abs().max()
            fits = largest * _over(base, module).double() <= 6 * 464
            expected = _over(base, module) if fits else (6 * 448 / largest).float()
            assert torch.equal(over, expected.reshape(1)), module
            kept.setdefault(factor, []).append(bool(fits))
    assert any(kept[1e-3])
    assert not any(kept[300.0])


@pytest.mark.parametrize("name", FORMATS)
def test_another_format_is_refused_by_name(models, tiny_adapters, tmp_path, name):
    other = "mxfp4" if name == "nvfp4" else "nvfp4"
    for to in ("int4", other):
        message = f"the adapters change are {name}, and stay so: to cannot be {to!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            merge_checkpoint(models[name], tmp_path / "x", [(tiny_adapters["a"], 1.0)], to=to)
    with pytest.raises(ValueError, match=r"to must be one of 'dense', 'int4', .*, got 'fp4'"):
        merge_checkpoint(models[name], tmp_path / "x", [(tiny_adapters["a"], 1.0)], to="fp4")


@pytest.mark.parametrize("to", ["int4", "nvfp4"])
def test_in_a_mixed_checkpoint_each_module_keeps_its_format(
    models, tiny_models, tiny_adapters, tmp_path, to
):
    folder = shutil.copytree(tiny_models["g128"], tmp_path / "mixed")
    other = tensors_of(models["nvfp4"])

    nvfp4 = ("weight_packed", "weight_scale", "weight_global_scale")
    changes = {part: lambda _, part=part: other[f"{Q_PROJ}.{part}"] for part in nvfp4}
    edit_tensors(folder, weight_shape=None, **changes)

    def regroup(config, quantization):
        group = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        quantization["config_groups"]["group_1"] = {
            "targets": [Q_PROJ],
            "weights": {**group, "symmetric": True},
            "format": "nvfp4-pack-quantized",
        }

    edit_config(folder, regroup)
    outcome = merge_checkpoint(folder, tmp_path / "merged", [(tiny_adapters["a"], 1.0)], to=to)
    after = open_checkpoint(tmp_path / "merged")
    assert Q_PROJ in {entry["module"] for entry in outcome.report["modules"]}
    assert [name for name in after.modules() if after.is_float4(name)] == [Q_PROJ]
    assert after.schemes == open_checkpoint(folder).schemes
