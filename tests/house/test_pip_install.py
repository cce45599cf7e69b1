"""The installer that tox uses: it prefers a CPU build of torch only where that can be had."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "pip_install.py"
WANTED = ["torch==2.13.0", "peft"]


@pytest.fixture
def script(monkeypatch):
    """Return the script as a module, on a Linux without driver whose index answers."""
    spec = importlib.util.spec_from_file_location("pip_install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(module, "cpu_index_answers", lambda: True)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return module


def test_the_cpu_index_is_added(script):
    assert script.extra_options(WANTED) == ["--extra-index-url", script.CPU_INDEX]


def test_only_for_a_pinned_torch(script):
    assert script.extra_options(["peft", "torch>=2.8"]) == []


def test_not_with_an_nvidia_driver(script, monkeypatch):
    monkeypatch.setattr(script, "has_nvidia_driver", lambda: True)
    assert script.extra_options(WANTED) == []


def test_not_on_another_platform(script, monkeypatch):
    monkeypatch.setattr(script.sys, "platform", "darwin")
    assert script.extra_options(WANTED) == []


def test_not_where_the_index_does_not_answer(script, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(script, "CPU_INDEX", "http://127.0.0.1:9")  # nothing listens there
    assert not script.cpu_index_answers()
    monkeypatch.setattr(script, "has_nvidia_driver", lambda: False)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert script.extra_options(WANTED) == []


def test_not_with_a_local_wheel_of_this_version_and_python(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path / 'none'} {tmp_path}")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (tmp_path / f"torch-2.12.0+cpu-{python}-{python}-linux_x86_64.whl").touch()
    (tmp_path / "torch-2.13.0+cpu-cp39-cp39-linux_x86_64.whl").touch()
    assert script.extra_options(WANTED) != []
    (tmp_path / f"torch-2.13.0+cpu-{python}-{python}-linux_x86_64.whl").touch()
    assert script.extra_options(WANTED) == []
