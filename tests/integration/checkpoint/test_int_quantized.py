"""Modules that store a byte for each code: read, verified, unpacked and merged into.

compressed-tensors' own compressor writes them here; codes are read by NumPy.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from int4_lora.integration import open_checkpoint
from int4_lora.integration.checkpoint.verify import verify
from int4_lora.reference import dequantize
from support import layouts
from support.conversion import convert, refusal, run, tensors_of

pytestmark = pytest.mark.versions

MODULE = "model.layers.0.self_attn.q_proj"
ROWS, COLUMNS = 22, 64  # rows that fill no whole words of zero-points
FORMS = {  # fields of the config's weights, and the shape of its scales
    "channel": ({"strategy": "channel", "group_size": None}, (ROWS, 1)),
    "channel asymmetric": (
        {"strategy": "channel", "group_size": None, "symmetric": False},
        (ROWS, 1),
    ),
    "group": ({"group_size": 16}, (ROWS, 4)),
    "group asymmetric": ({"group_size": 16, "symmetric": False}, (ROWS, 4)),
    "tensor": ({"strategy": "tensor", "group_size": None, "symmetric": False}, (1,)),
    "4 bits": ({"num_bits": 4, "group_size": 16, "symmetric": False}, (ROWS, 4)),
}


def compressed(fields, table, dtype=torch.bfloat16):
    """Return the tensors that compressed-tensors stores for random values."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    generator = torch.Generator().manual_seed(0)
    bits = fields["num_bits"]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    tensors = {
        "weight": torch.randn(ROWS, COLUMNS, generator=generator).to(dtype),
        "weight_scale": (torch.rand(table, generator=generator) * 6 / high + 0.01).to(dtype),
    }
    if not fields["symmetric"]:
        zeros = torch.randint(low, high, table, generator=generator)
        tensors["weight_zero_point"] = zeros.to(torch.int8)
    known = ("num_bits", "type", "symmetric", "strategy", "group_size")
    args = QuantizationArgs(**{name: fields[name] for name in known})
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    return compressor.compress(tensors, scheme)


@pytest.fixture
def make(tmp_path):
    """Return what writes a checkpoint of one module and returns its folder and tensors."""

    def write(form="channel", *, form_name="int-quantized", **changes):
        fields, table = FORMS[form]
        group = layouts.group(**{"num_bits": 8, **fields})
        tensors = {**compressed(group["weights"], table), **changes}
        folder = tmp_path / "source"
        folder.mkdir()
        stored = {f"{MODULE}.{part}": tensor for part, tensor in tensors.items()}
        save_file(stored, folder / "model.safetensors")
        quantization = layouts.quantization({"group_0": group}, format=form_name)
        config = {"model_type": "llama", "quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(config))
        return folder, tensors

    return write


def by_numpy(tensors):
    """Return (q - z) * s in float64."""
    codes = tensors["weight"].numpy().astype(np.float64)
    scale = tensors["weight_scale"].float().numpy().astype(np.float64)
    zeros = tensors.get("weight_zero_point", torch.zeros(scale.shape)).numpy().astype(np.float64)
    if scale.ndim == 1:
        return torch.from_numpy((codes - zeros) * scale)
    each = COLUMNS // scale.shape[1]
    return torch.from_numpy((codes - zeros.repeat(each, 1)) * scale.repeat(each, 1))


@pytest.mark.parametrize("form_name", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_is_read_to_the_bit(make, form, form_name):
    folder, tensors = make(form, form_name=form_name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.is_packed(MODULE)
    weight = checkpoint.packed_weight(MODULE)
    assert weight.shape == (ROWS, COLUMNS) == checkpoint.shape_of(MODULE)
    assert torch.equal(dequantize(weight), by_numpy(tensors).to(torch.bfloat16))
    assert [finding.verdict for finding in verify(checkpoint)] == ["same"]
    module = json.loads(run("inspect", folder, "--json").stdout)["modules"][0]
    assert (module["shape"], module["packed"]) == ([ROWS, COLUMNS], True)
    assert module["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("form", FORMS)
def test_it_is_unpacked_without_compressed_tensors(make, form, tmp_path, monkeypatch):
    folder, tensors = make(form)
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors", None)
    convert("unpack", folder, tmp_path / "dense")
    found = tensors_of(tmp_path / "dense")[f"{MODULE}.weight"]
    assert torch.equal(found, by_numpy(tensors).to(torch.bfloat16))


@pytest.mark.parametrize("form", FORMS)
def test_merged_into_its_own_format(make, form, tmp_path):
    folder, tensors = make(form)
    generator = torch.Generator().manual_seed(1)
    pair = {
        "a": torch.randn(2, COLUMNS, generator=generator),
        "b": torch.randn(ROWS, 2, generator=generator),
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    prefix = f"base_model.model.{MODULE}"
    save_file(
        {f"{prefix}.lora_A.weight": pair["a"], f"{prefix}.lora_B.weight": pair["b"]},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    to = "int4" if form == "4 bits" else "int8"
    outcome = convert("merge", folder, tmp_path / "merged", f"--adapter={adapter}", f"--to={to}")
    merged = tensors_of(tmp_path / "merged")
    assert {name.rpartition(".")[2]: (one.dtype, one.shape) for name, one in merged.items()} == {
        name: (one.dtype, one.shape) for name, one in tensors.items()
    }
    found = by_numpy({name.rpartition(".")[2]: one for name, one in merged.items()})
    found = found.to(torch.bfloat16).double()
    delta = pair["b"].double() @ pair["a"].double()
    exact = by_numpy(tensors).to(torch.bfloat16).double() + delta
    error = float((found - exact).norm() / exact.norm())
    assert error == pytest.approx(outcome["report"]["total"]["relative_error"], rel=1e-6)
    assert error < (0.2 if form == "4 bits" else 0.02)
    other = "int8" if to == "int4" else "int4"
    said = refusal("merge", folder, tmp_path / "x", f"--adapter={adapter}", f"--to={other}")
    assert f"to cannot be '{other}'" in said


@pytest.mark.parametrize(
    ("form", "changes", "sentence"),
    [
        ("channel", {"weight": torch.zeros(ROWS, COLUMNS, dtype=torch.int32)},
         "weight must be int8, got int32"),
        ("channel", {"weight": torch.zeros(ROWS, dtype=torch.int8)},
         r"weight must be \[out_features, in_features\]"),
        ("channel", {"weight_packed": torch.zeros(ROWS, 16, dtype=torch.int32)},
         "weight_packed is stored beside weight, and int-quantized has none"),
        ("channel", {"weight_scale": torch.ones(ROWS, 3)}, "scale has 3 groups, which do not"),
        ("channel asymmetric", {"weight_zero_point": torch.zeros(ROWS, 1, dtype=torch.int32)},
         "weight_zero_point must be int8, got int32"),
        ("channel asymmetric", {"weight_zero_point": torch.zeros(ROWS, 2, dtype=torch.int8)},
         "weight_zero_point must be the shape of weight_scale"),
        ("4 bits", {"weight": torch.full((ROWS, COLUMNS), 8, dtype=torch.int8)},
         r"codes must be in \[-8, 7\] for 4 bits, got 8"),
    ],
)  # fmt: skip
def test_refuses(make, form, changes, sentence):
    folder, _ = make(form, **changes)
    with pytest.raises((TypeError, ValueError), match=sentence) as refused:
        open_checkpoint(folder).packed_weight(MODULE)
    assert MODULE in str(refused.value)
    assert "model.safetensors" in str(refused.value)
