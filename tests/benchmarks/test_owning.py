"""The benchmarks of unpacking and merging run and print; their times are not checked."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_unpacking_beside_copying(module, monkeypatch, tmp_path):
    unpack = module("unpack")
    monkeypatch.setattr(unpack, "SIZE", 256)
    found = unpack.measured(tmp_path, gigabytes=1e-3, rounds=1, jobs=1)
    assert found["int4_bytes"] >= 1e6
    assert found["dense_bytes"] > 4 * found["int4_bytes"]
    assert len(found["unpack"]) == len(found["copy"]) == len(found["peak"]) == 1
    assert min(found["peak"]) > 1e8  # torch alone
    assert "speed over copying" in unpack.table(found)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


def test_losses_of_merged_models(module, monkeypatch, tmp_path):
    quality = module("merge_quality")
    (library, _), (pages, held) = quality.texts()
    monkeypatch.setattr(quality, "texts", lambda: ((library, None), (pages, held[:2048])))
    monkeypatch.setattr(quality, "BATCH", 4)
    found, reports = quality.measured(tmp_path, steps=4, steps_of_lora=2)
    assert found["merged, dense"] == pytest.approx(found["INT4 + LoRA"], abs=1e-3)
    errors = {name: one["relative_error"] for name, one in reports.items()}
    assert errors["merged, INT4, scale search"] < errors["merged, INT4, min-max"]
    assert 0 < errors["INT4 + LoRA in bfloat16"] < 2**-7 < errors["INT4 + LoRA in INT4"] < 0.5
    assert found["INT4 + LoRA in bfloat16"] == pytest.approx(found["INT4 + LoRA"], abs=1e-3)
    assert found["INT4 + LoRA in INT4"] != found["INT4 + LoRA"]
    assert quality.table(found, reports).count("|\n") == len(found) + 1
