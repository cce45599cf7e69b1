"""int4-lora doctor: versions, what works, what to install."""

import json
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from int4_lora.compiled.formulations import FORMULATIONS
from int4_lora.integration.cli import doctor
from int4_lora.integration.cli.app import app

pytestmark = pytest.mark.versions


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def versions(monkeypatch):
    """Return a dict whose versions replace the installed ones; None is not installed."""
    replaced = {}

    def found(name):
        if name not in replaced:
            return version(name)
        if replaced[name] is None:
            raise PackageNotFoundError(name)
        return replaced[name]

    monkeypatch.setattr(doctor, "version", found)
    return replaced


def test_everything_fits_here():
    result = run("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    lacking = {part for part, works in found["parts"].items() if not works}
    plots = find_spec("matplotlib") is not None  # not in every environment of tox
    assert lacking == (set() if plots else {"int4-lora train (with checkpoints and hf)"})
    packages = {one["package"]: one for one in found["packages"]}
    assert packages["torch"]["found"] == version("torch")
    assert packages["torch"]["part"] == ""
    assert packages["compressed-tensors"]["part"] == "checkpoints"
    assert packages["peft"]["part"] == "hf"
    assert packages["accelerate"]["part"] == "train"
    assert len(packages) == len(found["packages"])


def test_what_is_missing_is_said_and_is_not_wrong(versions):
    versions["peft"] = None
    result = run()
    assert result.exit_code == 0
    assert "missing" in result.output
    assert "the demo (with checkpoints): install int4-lora[hf]" in result.output


def test_what_training_needs_is_named(versions):
    versions["accelerate"] = None
    result = run()
    assert result.exit_code == 0
    assert "int4-lora train (with checkpoints and hf): install int4-lora[train]" in result.output


@pytest.mark.parametrize(("package", "old"), [("torch", "2.7.1"), ("peft", "0.1.0")])
def test_what_does_not_fit_is_wrong(versions, package, old):
    versions[package] = old
    result = run()
    assert result.exit_code == 1
    assert "does not fit" in result.output


def test_a_core_that_is_missing_is_wrong(versions):
    versions["safetensors"] = None
    assert run().exit_code == 1


def test_a_local_build_and_a_release_candidate_fit(versions):
    versions["torch"] = "2.13.0+cpu"
    versions["transformers"] = "5.24.0rc1"
    assert run().exit_code == 0


def test_packages_that_do_not_go_together_are_wrong(versions):
    """compressed-tensors 0.16 and later need torch 2.10, whatever int4-lora takes."""
    needed = next(
        text for text in requires("compressed-tensors") if text.startswith("torch") and ">=" in text
    )
    versions["torch"] = "2.8.0"
    fits = Requirement(needed).specifier.contains("2.8.0")
    result = run("--json")
    found = json.loads(result.stdout)
    conflicts = [one for one in found["packages"] if one["by"] == "compressed-tensors"]
    assert result.exit_code == (0 if fits else 1)
    assert [one["package"] for one in conflicts] == ([] if fits else ["torch"])
    assert found["parts"]["int4-lora verify"] == fits


def test_a_part_needs_the_core(versions):
    versions["torch"] = "unknown"
    result = run("--json")
    assert result.exit_code == 1
    assert not any(json.loads(result.stdout)["parts"].values())


def test_formulations_that_cannot_run_say_why(monkeypatch):
    found = json.loads(run("--json").stdout)["formulations"]
    assert set(found) == set(FORMULATIONS)
    assert found["tiles"] is None
    if not torch.cuda.is_available():
        assert found["magic_gemv"] == "meant for a GPU, and torch finds none"
        monkeypatch.setenv("CXX", "no-such-compiler")
        found = json.loads(run("--json").stdout)["formulations"]
        assert found["tiles"] == "Inductor needs a C++ compiler: no-such-compiler is not there"
        assert found["int4pack"] is found["int8pack"] is None
        assert "formulation magic_gemv: meant for a GPU, and torch finds none" in run().stdout
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert json.loads(run("--json").stdout)["formulations"]["magic_gemv"] is None
