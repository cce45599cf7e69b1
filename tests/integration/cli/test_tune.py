"""``int4-lora tune``: every kind of layer once, alone and with adapters."""

import json

import pytest
import torch
from typer.testing import CliRunner

from int4_lora.compiled.selection import tuning
from int4_lora.compiled.selection.tuning import Point
from int4_lora.integration.cli.app import app


@pytest.fixture
def asked(monkeypatch):
    """Return what the command wants measured; nothing is."""
    calls = []

    def measured(weight, dtype, lora, *, tokens, progress):
        adapters = None if lora is None else (lora.adapters, lora.slices[0].rank)
        calls.append((weight.shape, dtype, adapters, tuple(tokens)))
        for count in tokens:
            progress(count)
        return [Point(count, {"tiles": 2.0, "gemv": 1.0}, {}, "gemv") for count in tokens]

    monkeypatch.setattr(tuning, "tune", measured)
    return calls


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_every_kind_is_measured_alone_and_with_adapters(tiny_models, asked):
    result = run(tiny_models["g32"], "--json", "--tokens=16", "--tokens=1", "--rank=3")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert sum(len(one["modules"]) for one in found if one["adapters"] == 0) == 14
    assert len({tuple(one["shape"]) for one in found}) == len(asked) // 2
    assert {(dtype, adapters, tokens) for _, dtype, adapters, tokens in asked} == {
        (torch.bfloat16, None, (1, 16)),
        (torch.bfloat16, (4, 3), (1, 16)),
    }


def test_the_base_alone_in_another_dtype(tiny_models, asked):
    result = run(tiny_models["g32"], "--adapters=0", "--dtype=float32", "--tokens=2")
    assert result.exit_code == 0, result.output
    assert {(dtype, adapters) for _, dtype, adapters, _ in asked} == {(torch.float32, None)}
    assert "2: gemv (1.000), tiles (2.000)" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens=0"], "--tokens must be 1 or more, got 0"),
        (["--device=nonsense"], "--device must be cpu, cuda or cuda:N, got 'nonsense'"),
        (["--device=meta"], "--device must be cpu"),
        (["--device=cuda:99"], "--device cuda:99 is not there"),
        (["--rank=0"], "--rank"),
        (["--dtype=int8"], "--dtype"),
    ],
)
def test_bad_options(tiny_models, asked, options, message):
    result = run(tiny_models["g32"], *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not asked


def test_what_is_no_checkpoint(tmp_path, asked):
    result = run(tmp_path)
    assert result.exit_code == 2
    assert str(tmp_path) in result.output.replace("\n", "")
