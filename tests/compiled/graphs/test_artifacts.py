"""Compiled graphs saved to a file: a second process that loads it compiles nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from int4_lora.compiled import load_artifacts, save_artifacts

TESTS = Path(__file__).parents[2]
PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
from int4_lora.compiled import (
    int4_lora_linear, load_artifacts, prepare, prepare_lora, save_artifacts
)
from support.weights import random_stack, random_weight, random_x

what, file = sys.argv[1:]
if what == "load":
    load_artifacts(file)
weight = prepare(random_weight(rows=48, columns=128, dtype=torch.bfloat16))
lora = prepare_lora(random_stack(rows=48, columns=128))
y = int4_lora_linear(random_x(3, 128, torch.bfloat16), weight, lora, torch.tensor([0, -1, 2]))
if what == "save":
    save_artifacts(file)
found = counters["inductor"]
print(json.dumps({"sum": y.double().sum().item(), "hits": found["fxgraph_cache_hit"],
                  "misses": found["fxgraph_cache_miss"] + found["fxgraph_cache_bypass"]}))
"""


def run(what, file, cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    command = [sys.executable, "-c", PROGRAM, what, file]
    result = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    file = tmp_path / "layers.artifacts"
    first = run("save", file, tmp_path / "one", monkeypatch)
    assert first["misses"] == 1
    second = run("load", file, tmp_path / "two", monkeypatch)
    assert second == {"sum": first["sum"], "hits": 1, "misses": 0}


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_artifacts(tmp_path / "nowhere")
    for content in (b"", b"nonsense"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="file: not a file of compiled graphs"):
            load_artifacts(tmp_path / "file")


def test_nothing_to_save_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compiler.save_cache_artifacts", lambda: None)
    with pytest.raises(ValueError, match="nothing was compiled"):
        save_artifacts(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
