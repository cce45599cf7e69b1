"""NVFP4 and MXFP4 checkpoints that compressed-tensors wrote: read, verified, unpacked, merged."""

import json
import re
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from int4_lora.integration import open_checkpoint, read_adapter
from int4_lora.integration.checkpoint.verify import verify
from int4_lora.integration.cli.app import app
from int4_lora.integration.conversion import merge_checkpoint, unpack_checkpoint
from int4_lora.reference import dequantize
from support.checkpoints import edit_config
from support.float4_checkpoints import make_float4

FORMATS = ("nvfp4", "mxfp4")
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def float4_models(tmp_path_factory):
    """Return the folder of a tiny FP4 Llama of each format, by name."""
    root = tmp_path_factory.mktemp("float4")
    return {name: make_float4(root / name, name) for name in FORMATS}


@pytest.fixture
def copied(float4_models, tmp_path):
    """Return a function that copies a model, which a test may spoil."""
    return lambda name: shutil.copytree(float4_models[name], tmp_path / name)


def tensors_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def edit_tensors(folder, change):
    """Let a function change the tensors of a model's only file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def upstream(folder, module, name):
    """Return compressed-tensors' decompression of a module of a file, in bfloat16."""
    stored = {
        key.removeprefix(f"{module}."): tensor
        for key, tensor in tensors_of(folder).items()
        if key.startswith(f"{module}.weight")
    }
    scheme = preset_name_to_scheme(f"{name.upper()}A16", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(f"{name}-pack-quantized")
    return compressor.decompress(stored, scheme)["weight"].to(torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
def test_every_module_is_read_and_verified(float4_models, name):
    checkpoint = open_checkpoint(float4_models[name])
    assert len(checkpoint.modules()) == 14
    for module in checkpoint.modules():
        weight = checkpoint.float4_weight(module)
        assert weight.format == name
        assert checkpoint.shape_of(module) == weight.shape
        assert torch.equal(dequantize(weight), upstream(float4_models[name], module, name))
    assert {finding.verdict for finding in verify(checkpoint)} == {"same"}


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_shows_format_and_scales(copied, name):
    folder = copied(name)
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    first = next(module for module in report["modules"] if module["name"] == Q_PROJ)
    assert first["format"] == f"{name}-pack-quantized"
    assert (first["bits"], first["shape"]) == (4, [256, 256])
    size = 16 if name == "nvfp4" else 32
    expected = 256 * 128 + 256 * 256 // size + (4 if name == "nvfp4" else 0)
    assert first["nbytes"] == expected

    def spoil(tensors):
        bits = tensors[f"{Q_PROJ}.weight_scale"].view(torch.uint8)
        bits[3, 1] = 0x7F if name == "nvfp4" else 255
        bits[4, 1] = 0x80 if name == "nvfp4" else 0

    edit_tensors(folder, spoil)
    result = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    first = next(module for module in report["modules"] if module["name"] == Q_PROJ)
    assert (first["nan_scales"], first["zero_scales"]) == (1, 1 if name == "nvfp4" else 0)


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_unpacking_rounds_once(float4_models, tmp_path, name, dtype):
    checkpoint = open_checkpoint(float4_models[name])
    unpack_checkpoint(float4_models[name], tmp_path / "dense", dtype=dtype)
    dense = tensors_of(tmp_path / "dense")
    for module in checkpoint.modules():
        expected = dequantize(checkpoint.float4_weight(module), dtype)
        assert dense[f"{module}.weight"].dtype == (dtype or torch.bfloat16)
        assert torch.equal(dense[f"{module}.weight"], expected)
    assert not any("scale" in key or "packed" in key for key in dense)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("name", FORMATS)
def test_merging_rounds_once(float4_models, tiny_adapters, tmp_path, name):
    path = tiny_adapters["a"]
    checkpoint, adapter = open_checkpoint(float4_models[name]), read_adapter(path)
    merge_checkpoint(float4_models[name], tmp_path / "merged", [(path, 0.5)])
    merged = tensors_of(tmp_path / "merged")
    assert adapter.modules
    for module, pair in adapter.modules.items():
        if module not in checkpoint.schemes:
            continue
        exact = dequantize(checkpoint.float4_weight(module), torch.float64)
        exact += 0.5 * pair.scaling * (pair.b.double() @ pair.a.double())
        error = (merged[f"{module}.weight"].double() - exact).abs()
        assert (error <= 2.0**-8 * exact.abs()).all()  # half a unit of bfloat16
        assert merged[f"{module}.weight"].dtype == torch.bfloat16
    result = CliRunner().invoke(
        app,
        [
            "merge",
            str(float4_models[name]),
            str(tmp_path / "int4"),
            f"--adapter={path}",
            "--to=int4",
        ],
    )
    assert result.exit_code == 2
    assert f"are {name}, and stay so: to cannot be 'int4'" in " ".join(result.output.split())


def test_a_mixed_checkpoint_has_both(tiny_models, float4_models, tmp_path):
    """One module of an INT4 model is NVFP4: each is read, verified and unpacked in its way."""
    folder = shutil.copytree(tiny_models["g128"], tmp_path / "mixed")
    other = tensors_of(float4_models["nvfp4"])

    def mix(tensors):
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{Q_PROJ}.{part}"]
        for part in ("weight_packed", "weight_scale", "weight_global_scale"):
            tensors[f"{Q_PROJ}.{part}"] = other[f"{Q_PROJ}.{part}"]

    def regroup(config, quantization):
        group = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        quantization["config_groups"]["group_1"] = {
            "targets": [Q_PROJ],
            "weights": {**group, "symmetric": True},
            "format": "nvfp4-pack-quantized",
        }

    edit_tensors(folder, mix)
    edit_config(folder, regroup)
    checkpoint = open_checkpoint(folder)
    assert [name for name in checkpoint.modules() if checkpoint.is_float4(name)] == [Q_PROJ]
    assert {finding.verdict for finding in verify(checkpoint)} == {"same"}
    unpack_checkpoint(folder, tmp_path / "dense")
    dense = tensors_of(tmp_path / "dense")
    assert torch.equal(dense[f"{Q_PROJ}.weight"], dequantize(checkpoint.float4_weight(Q_PROJ)))
    other_name = Q_PROJ.replace("q_proj", "k_proj")
    packed = dequantize(checkpoint.packed_weight(other_name))
    assert torch.equal(dense[f"{other_name}.weight"], packed)
    with pytest.raises(ValueError, match=r"is nvfp4-pack-quantized \(float, 4 bits\)"):
        checkpoint.packed_weight(Q_PROJ)
    with pytest.raises(ValueError, match=r"is pack-quantized \(int, 4 bits\), not nvfp4-pack"):
        checkpoint.float4_weight(other_name)


def test_scales_of_activations_are_left_out(copied, tmp_path):
    folder = copied("nvfp4")
    edit_tensors(folder, lambda t: t.update({f"{Q_PROJ}.input_global_scale": torch.tensor([3.0])}))
    checkpoint = open_checkpoint(folder)
    assert {finding.verdict for finding in verify(checkpoint)} == {"same"}
    outcome = unpack_checkpoint(folder, tmp_path / "dense")
    assert list(outcome.dropped) == [f"{Q_PROJ}.input_global_scale"]
    dense = tensors_of(tmp_path / "dense")
    assert torch.equal(dense[f"{Q_PROJ}.weight"], dequantize(checkpoint.float4_weight(Q_PROJ)))


def test_verify_names_what_compressed_tensors_does_otherwise(copied):
    folder = copied("nvfp4")

    def beside_ties(tensors):
        over = tensors[f"{Q_PROJ}.weight_global_scale"]
        over.fill_(1 / (1 + 3 / 256))
        tensors[f"{Q_PROJ}.weight_scale"].fill_(1.0)

    edit_tensors(folder, beside_ties)
    findings = {finding.name: finding for finding in verify(open_checkpoint(folder))}
    assert findings[Q_PROJ].verdict in ("same", "upstream_wrong")
    off = []
    for odd in range(1, 256, 2):
        edit_tensors(
            folder, lambda t, odd=odd: t[f"{Q_PROJ}.weight_global_scale"].fill_(1 / (1 + odd / 256))
        )
        checkpoint = open_checkpoint(folder)
        finding = next(each for each in verify(checkpoint) if each.name == Q_PROJ)
        if finding.verdict != "same":
            off.append(finding)
            break
    assert off[0].verdict == "upstream_wrong"
    assert "weights are rounded in steps, and are one place off" in off[0].detail
    folder = copied("mxfp4")
    edit_tensors(folder, lambda t: t[f"{Q_PROJ}.weight_scale"][2, 1:2].fill_(255))
    finding = next(each for each in verify(open_checkpoint(folder)) if each.name == Q_PROJ)
    assert finding.verdict == "upstream_wrong"
    assert finding.detail == "E8M0 scales of 255, which are NaN, are taken for 2^128"


def without(part):
    return lambda tensors: tensors.pop(f"{Q_PROJ}.{part}")


def with_tensor(part, tensor):
    return lambda tensors: tensors.update({f"{Q_PROJ}.{part}": tensor})


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("nvfp4", without("weight_global_scale"), ValueError,
         "weight_global_scale of an nvfp4-pack-quantized module is missing"),
        ("nvfp4", without("weight_scale"), ValueError, "weight_scale of an nvfp4"),
        ("mxfp4", with_tensor("weight_global_scale", torch.ones(1)), ValueError,
         "weight_global_scale is stored, and mxfp4-pack-quantized has none"),
        ("nvfp4", with_tensor("weight_zero_point", torch.ones(1)), ValueError,
         "weight_zero_point is stored, and nvfp4-pack-quantized has none"),
        ("nvfp4", with_tensor("weight_scale", torch.ones(256, 8).byte()), ValueError,
         "global_scale must be None with the E8M0 scales"),
        ("mxfp4", with_tensor("weight_scale", torch.ones(256, 16).to(torch.float8_e4m3fn)),
         TypeError, "weight_scale of mxfp4-pack-quantized has the dtype of nvfp4: float8_e4m3fn"),
        ("mxfp4", with_tensor("weight_scale", torch.ones(256, 4).byte()), ValueError,
         "scale must be [out_features, in_features / 32]"),
        ("mxfp4", with_tensor("weight_packed", torch.ones(256, 128).int()), TypeError,
         "packed must be uint8, got int32"),
        ("nvfp4", with_tensor("weight_global_scale", torch.ones(1).half()), TypeError,
         "global_scale must be float32, got float16"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(copied, tmp_path, name, change, error, message):
    folder = copied(name)
    edit_tensors(folder, change)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(error, match=re.escape(message)) as caught:
        checkpoint.float4_weight(Q_PROJ)
    assert Q_PROJ in str(caught.value)
    finding = next(each for each in verify(checkpoint) if each.name == Q_PROJ)
    assert (finding.verdict, message in finding.detail) == ("unreadable", True)
    with pytest.raises(error, match=re.escape(message)):
        unpack_checkpoint(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_groups_of_another_size_in_the_config_are_refused(copied):
    folder = copied("mxfp4")

    def regroup(config, quantization):
        quantization["config_groups"]["group_0"]["weights"]["group_size"] = 16

    edit_config(folder, regroup)
    with pytest.raises(
        ValueError, match=r"symmetric in groups of 32, config\.json says symmetric and"
    ):
        open_checkpoint(folder).float4_weight(Q_PROJ)
