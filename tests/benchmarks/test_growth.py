"""The growth benchmark: every size grows alone, and the floor is the larger of two times."""

import importlib
import json
from pathlib import Path

import pytest

from support.eager_graphs import without_inductor

SMALL = {"tokens": [1, 3], "adapters": [2, 5], "rank": [4], "width": [128, 256]}


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_sizes_grow_one_at_a_time_with_their_floors(module, monkeypatch, tmp_path):
    growth = module("growth")
    without_inductor(monkeypatch)
    monkeypatch.setattr(module("operands"), "copies_beyond_the_cache", lambda *given: 2)
    monkeypatch.setattr(module("machine"), "COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(module("command"), "RESULTS", tmp_path)
    sizes = [text for name, values in SMALL.items() for text in (f"--{name}", *map(str, values))]
    limits = ["--rounds", "2", "--budget", "0", "--threads", "1", "--fixed-width", "128"]
    arguments = [*sizes, *limits, "--output", "grown"]
    assert growth.main(arguments) == 0
    record = json.loads((tmp_path / "grown.json").read_text())
    rows = record["rows"]
    names = ("tokens", "adapters", "rank", "columns")
    assert [[row["grown"], *(row[name] for name in names)] for row in rows] == [
        ["tokens", 1, 4, 16, 128],
        ["tokens", 3, 4, 16, 128],
        ["adapters", 5, 2, 16, 128],
        ["adapters", 5, 5, 16, 128],
        ["rank", 16, 4, 4, 128],
        ["width", 16, 4, 16, 128],
        ["width", 16, 4, 16, 256],
    ]
    rate, bandwidth = (
        record["dense_operations_per_second"],
        record["machine"]["copy_bytes_per_second"],
    )
    for row in rows:
        base = 2 * row["tokens"] * row["columns"] ** 2
        adapters = 4 * row["tokens"] * row["rank"] * row["columns"]
        for name, operations in (("ours", base), ("ours + LoRA", base + adapters)):
            least = max(row["bytes"][name] / bandwidth, operations / rate)
            assert row["floor_milliseconds"][name] == pytest.approx(1e3 * least)
    assert len((tmp_path / "grown.md").read_text().splitlines()) == 4 + len(rows)


def test_the_rate_is_the_most_of_any_row(module):
    rows = [
        {"operations": {"dense": operations}, "milliseconds": {"dense": milliseconds}}
        for operations, milliseconds in ((1e6, 1.0), (8e6, 2.0), (8e6, 4.0))
    ]
    assert module("growth").dense_rate([*rows, {"milliseconds": {}}]) == pytest.approx(4e9)
