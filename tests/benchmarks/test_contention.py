"""Contention: the halves are measured by turns, and busy processes stand still in the quiet one."""

import importlib
import sys
import time
from pathlib import Path

import pytest

from support.children import Answers


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_the_halves_take_turns_and_processes_compute_in_one_of_them(module, monkeypatch, tmp_path):
    contention, asked = module("contention"), []
    monkeypatch.setattr(contention, "SETTLE", 0)
    monkeypatch.setattr(
        contention, "Child", lambda name, log: Answers(log.name, asked, lambda *given: None)
    )
    busy = contention.BusyProcesses(2, tmp_path)
    assert [command for _, command, _ in asked] == ["compute", "pause"] * 2
    asked.clear()
    calls = {"A": lambda number: asked.append(("A", "run", None))}
    quiet, beside = contention.measure_by_turns(calls, busy, rounds=8, budget=1)
    commands = [command for _, command, _ in asked]
    each = ["run"] * 5  # three of them to warm up
    assert commands == [*each, *["resume"] * 2, *each, *["pause"] * 2] * contention.TURNS
    assert [len(half["A"].seconds) for half in (quiet, beside)] == [8, 8]
    busy.close()
    assert asked[-2:] == [("busy-0.log", "close", None), ("busy-1.log", "close", None)]


@pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc")
def test_a_busy_process_computes_only_at_work(module, tmp_path):
    busy = module("contention").BusyProcesses(1, tmp_path)
    try:
        (child,) = busy.children
        with busy.at_work():
            before = child.cpu_seconds()
            for _ in range(200):
                time.sleep(0.05)
                if child.cpu_seconds() > before:
                    break
            else:
                pytest.fail("it did not compute")
        time.sleep(0.05)
        before = child.cpu_seconds()
        time.sleep(0.1)
        assert child.cpu_seconds() == before
    finally:
        busy.close()
