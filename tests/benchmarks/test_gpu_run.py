"""The GPU run from end to end on a CPU, with the formulations of a CPU and without Inductor."""

import importlib
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from int4_lora.compiled import prepare
from int4_lora.compiled.formulations import magic_gemv
from int4_lora.reference import quantize
from support.eager_graphs import without_inductor

SMALL = ("--shapes", "64x256", "--threads", "1")


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def run(module, monkeypatch, tmp_path):
    """Return a function that runs the command with two rounds, and returns the exit code."""
    command = module("gpu_run.__main__")
    without_inductor(monkeypatch)
    monkeypatch.setattr(command, "ROUNDS", 2)
    monkeypatch.setattr(command, "ROW_SECONDS", 0)
    monkeypatch.setattr(module("operands"), "copies_beyond_the_cache", lambda *given: 2)
    monkeypatch.setattr(module("machine"), "COPY_BYTES", {"cpu": 2**20})
    return lambda *arguments: command.main(["--output", str(tmp_path), *SMALL, *arguments])


def read(folder, part):
    """Return the record of a part."""
    return json.loads((folder / f"{part}.json").read_text())


def test_every_part_runs_and_leaves_its_file(run, tmp_path, capsys):
    cases = "int4_linear/exact/bf16,int4_lora_linear/exact/bf16"
    assert run("--tokens", "5", "--cases", cases, "--budget", "60m") == 0
    files = {file.name for file in tmp_path.iterdir()}
    parts = {"layers", "sweep", "conformance", "served", "profile"}
    assert files >= {f"{part}.json" for part in parts} | {"profile-trace.json", "report.md"}
    assert len(files) <= 8
    (cell,), (row,) = read(tmp_path, "layers")["cells"], read(tmp_path, "sweep")["rows"]
    assert {"ours", "ours + LoRA", "dense", "formulation tiles"} <= set(cell["milliseconds"])
    assert [row["formulation"], row["refused"]] == ["tiles", {}]
    assert set(row["milliseconds"]) == {f"formulation tiles {size} MiB" for size in (2, 4, 8, 16)}
    judged = read(tmp_path, "conformance")["formulations"]
    assert {report["conforms"] for report in judged} == {True}
    assert any(report["backend"].startswith("tiles ") for report in judged)
    assert all(report["computed"][report["backend"]] for report in judged)
    replays = read(tmp_path, "served")["rows"]
    assert [replay["wrong"] for replay in replays] == [None] * 5
    kernels = read(tmp_path, "profile")["kernels"]
    assert {"ours", "ours + LoRA", "dense"} == {kernel["layer"] for kernel in kernels}
    report = (tmp_path / "report.md").read_text()
    assert report.strip() == capsys.readouterr().out.strip()
    assert [line[3:] for line in report.splitlines() if line.startswith("## ")] == list(
        ("layers", "sweep", "conformance", "served", "profile")
    )


def test_a_run_cut_short_leaves_what_it_measured(run, tmp_path, module, monkeypatch):
    command = module("gpu_run.__main__")

    def killed(run):
        yield {"rows": []}, "half a table"
        raise KeyboardInterrupt

    def fails(run):
        yield {"rows": []}, "half a table"
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(command.PARTS, "sweep", (fails, 0.1))
    monkeypatch.setitem(command.PARTS, "conformance", (killed, 0.1))
    with pytest.raises(KeyboardInterrupt):
        run("--tokens", "1", "5", "--budget", "0")
    assert [cell["tokens"] for cell in read(tmp_path, "layers")["cells"]] == [1]
    assert read(tmp_path, "sweep")["failed"] == "RuntimeError: no such kernel"
    assert "half a table\n\nThe part failed: RuntimeError" in (tmp_path / "report.md").read_text()
    assert "served.json" not in {file.name for file in tmp_path.iterdir()}


def test_what_is_wrong_is_named(module):
    faults = module("gpu_run.__main__").faults
    cell = {"rows": 8, "columns": 16, "tokens": 1, "refused": {"ours": "wrong", "B": "absent"}}
    assert faults({"cells": [cell]}) == ["8 x 16, 1 tokens: ours: wrong"]
    cases = [{"case": name, "status": name} for name in ("passed", "failed")]
    assert faults({"formulations": [{"backend": "tiles", "cases": cases}]}) == ["tiles: failed"]
    rows = [{"tokens": 2, "ids": name, "wrong": wrong} for name, wrong in (("a", None), ("b", "x"))]
    assert faults({"vllm": "installed", "rows": rows}) == ["2 tokens, ids: b: x"]


def test_launches_differ_from_the_default_in_one_number(module):
    sweep, launch = module("gpu_run.sweep"), magic_gemv.ONE_TOKEN
    weight = prepare(quantize(torch.ones(8, 2048), group_size=128), layout="interleaved")
    fixed = []
    for launched in sweep.variants(magic_gemv.MAGIC_GEMV, weight, 1):
        with mock.patch.object(sweep, "launching") as backend:
            launched.backend(weight, (1, 1))
        other, length = backend.call_args.args
        assert length == 256  # words of a row, which the sweep does not change
        assert launched.name == f"magic_gemv {sweep._in_words(other)}"
        fixed.append(other)
    assert fixed[0] == launch
    assert len(set(fixed)) == len(fixed) > 10
    for other in fixed[1:]:
        assert sum(vars(other)[name] != value for name, value in vars(launch).items()) == 1
        assert all(value is None or value >= 1 for value in vars(other).values())
