"""``int4-lora adapter quantize`` and ``dequantize``: folders, errors, and what is refused."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from int4_lora.integration import read_adapter, write_adapter
from int4_lora.integration.adapter.quantize import dequantize_adapter, quantize_adapter
from int4_lora.integration.cli.app import app
from int4_lora.integration.conversion import merge_checkpoint
from support.adapter_files import DOWN_PROJ, Q_PROJ, keyed, pairs, write_folder

SETTINGS = {"use_rslora": True, "rank_pattern": {}, "modules_to_save": ["embed_tokens"]}
COPY = {"base_model.model.model.embed_tokens.weight": torch.full((6, 4), 0.25)}


@pytest.fixture
def floats(tmp_path):
    """Return an adapter with options, pairs and a whole tensor."""
    return write_folder(tmp_path / "floats", {**keyed(), **COPY}, **SETTINGS)


def invoke(*arguments):
    return CliRunner().invoke(app, ["adapter", *map(str, arguments)])


def test_the_errors_are_those_of_the_dense_products(floats, tmp_path):
    written = quantize_adapter(floats, tmp_path / "int4")
    assert {error.module for error in written.errors} == {Q_PROJ, DOWN_PROJ}
    for error in written.errors:
        a, b = (matrix.double() for matrix in pairs()[error.module])
        module = written.adapter.modules[error.module]
        new_a, new_b = module.a.double(), module.b.double()
        assert error.rank == 2
        assert error.a == pytest.approx(float((new_a - a).norm() / a.norm()), rel=1e-9)
        assert error.b == pytest.approx(float((new_b - b).norm() / b.norm()), rel=1e-9)
        dense = float((new_b @ new_a - b @ a).norm() / (b @ a).norm())
        assert error.delta == pytest.approx(dense, rel=1e-6)
        assert 0.01 < error.delta < 0.3
    sizes = [
        sum(tensor.nbytes for tensor in load_file(folder / "adapter_model.safetensors").values())
        for folder in (floats, tmp_path / "int4")
    ]
    assert [written.nbytes_before, written.nbytes_after] == sizes


def test_a_pair_that_adds_zero_loses_nothing(tmp_path):
    pair = (torch.ones(2, 4), torch.zeros(6, 2))
    folder = write_folder(tmp_path / "floats", keyed(modules={Q_PROJ: pair}))
    (error,) = quantize_adapter(folder, tmp_path / "int4").errors
    assert (error.b, error.delta) == (0.0, 0.0)


def test_there_and_back_keeps_all_but_the_pairs(floats, tmp_path):
    quantize_adapter(floats, tmp_path / "int4")
    back = dequantize_adapter(tmp_path / "int4", tmp_path / "back")
    configs = [
        json.loads((folder / "adapter_config.json").read_text())
        for folder in (floats, tmp_path / "back")
    ]
    assert configs[0] == configs[1]
    tensors = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert tensors.keys() == {*keyed(), *COPY}
    assert torch.equal(tensors[next(iter(COPY))], COPY[next(iter(COPY))])
    int4 = read_adapter(tmp_path / "int4")
    for name, module in back.modules.items():
        assert torch.equal(module.a, int4.modules[name].a)
        assert torch.equal(module.b, int4.modules[name].b)
        assert module.scaling == int4.modules[name].scaling == 3 / 2**0.5
    assert back.replacements.keys() == int4.replacements.keys() == {"model.embed_tokens.weight"}


def test_merge_takes_an_adapter_in_int4(tiny_models, tiny_adapters, tmp_path):
    """The merged weights are those of the dequantised adapter."""
    name, source = next(iter(tiny_adapters.items()))
    quantize_adapter(source, tmp_path / "int4")
    dequantize_adapter(tmp_path / "int4", tmp_path / "back")
    merged = {}
    for kind, folder in (("int4", "int4"), ("floats", "back"), ("given", source)):
        target = tmp_path / f"merged-{kind}"
        merge_checkpoint(tiny_models["g128"], target, [(tmp_path / folder, 1.0)])
        merged[kind] = load_file(next(target.glob("*.safetensors")))
    for key, tensor in merged["int4"].items():
        assert torch.equal(tensor, merged["floats"][key]), (name, key)
    assert any(
        not torch.equal(tensor, merged["given"][key]) for key, tensor in merged["int4"].items()
    )


def test_what_is_refused(floats, tmp_path):
    write_adapter(tmp_path / "int4", read_adapter(floats).modules, bits=4)
    (tmp_path / "taken").mkdir()
    rows = write_folder(tmp_path / "rows", COPY, modules_to_save=["embed_tokens"])
    cases = [
        (
            quantize_adapter,
            tmp_path / "int4",
            "new",
            ValueError,
            "is an adapter in INT4 (groups of",
        ),
        (dequantize_adapter, floats, "new", ValueError, "is an adapter in floats already"),
        (quantize_adapter, floats, "taken", FileExistsError, "taken is there already"),
        (dequantize_adapter, tmp_path / "int4", "taken", FileExistsError, "taken is there already"),
        (quantize_adapter, rows, "new", ValueError, "rows holds no lora_A and lora_B to quantise"),
        (quantize_adapter, tmp_path / "no", "new", FileNotFoundError, "is not a folder"),
    ]
    for function, source, target, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            function(source, tmp_path / target)
        assert not (tmp_path / "new").exists()
    with pytest.raises(
        ValueError, match=r"floats: group_size must divide the columns of base_model"
    ):
        quantize_adapter(floats, tmp_path / "new", group_size=3)
    with pytest.raises(TypeError, match="symmetric must be a bool, got int"):
        quantize_adapter(floats, tmp_path / "new", symmetric=1)


def test_the_commands(floats, tmp_path):
    result = invoke("quantize", floats, tmp_path / "int4")
    assert result.exit_code == 0, result.output
    assert "2 modules" in result.output
    assert DOWN_PROJ in result.output
    assert "x smaller" in " ".join(result.output.split())  # long folders are wrapped
    result = invoke(
        "quantize", floats, tmp_path / "asym", "--asymmetric", "--group-size=4", "--json"
    )
    assert result.exit_code == 2
    assert (
        "columns of base_model.model.model.layers.1.mlp.down_proj.lora_A.weight, 10"
        in result.output
    )
    result = invoke(
        "quantize", floats, tmp_path / "asym", "--asymmetric", "--group-size=5", "--json"
    )
    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    assert {module["module"] for module in printed["modules"]} == {Q_PROJ, DOWN_PROJ}
    assert printed["bytes_before"] == sum(tensor.nbytes for tensor in {**keyed(), **COPY}.values())
    assert "asymmetric" in read_adapter(tmp_path / "asym").notes[0]
    result = invoke("dequantize", tmp_path / "int4", tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert "back: 2 modules" in result.output
    result = invoke("dequantize", floats, tmp_path / "again")
    assert result.exit_code == 2
    assert "is an adapter in floats already" in result.output


def test_the_table_shows_the_worst_first_and_all_on_request(tmp_path):
    generator = torch.Generator().manual_seed(3)
    modules = {
        f"model.layers.{number}.q_proj": (
            torch.randn(2, 4, generator=generator),
            torch.randn(6, 2, generator=generator),
        )
        for number in range(30)
    }
    folder = write_folder(tmp_path / "floats", keyed(modules=modules))
    short = invoke("quantize", folder, tmp_path / "a").output
    long = invoke("quantize", folder, tmp_path / "b", "--all").output
    assert short.count("q_proj") == 20
    assert long.count("q_proj") == 30
    rows = re.findall(r"q_proj.*?([\d.]+) +│", long)
    lost = [float(number) for number in rows]
    assert len(lost) == 30
    assert lost == sorted(lost, reverse=True)
