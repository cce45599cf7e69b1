"""Child processes answer, pause and end; the serving benchmark shuffles the order of its runs."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support.children import Answers, assert_only_who_runs_goes_on

ROOT = Path(__file__).parents[2]
ECHO = """
import sys
import threading
from benchmarks.child import serve

def fails():
    raise ValueError("not today")

def spin():
    def work():
        while True:
            pass

    threading.Thread(target=work, daemon=True).start()

print("noise before")
echo, ends = lambda **given: print("noise") or given, lambda: sys.exit(3)
serve({"spin": spin, "echo": echo, "fails": fails, "ends": ends})
"""


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports from ``benchmarks``, which is not part of the wheel."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def child(module, monkeypatch, tmp_path):
    (tmp_path / "echo_child.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    one = module("child").Child("echo_child", tmp_path / "log")
    yield one
    one.close()


def test_a_child_answers_whatever_it_prints(child):
    assert child.ask("echo", a=[1, None]) == {"a": [1, None]}
    with pytest.raises(RuntimeError, match=r"fails: ValueError: not today\n(.|\n)*noise$"):
        child.ask("fails")
    assert child.ask("echo") == {}
    if sys.platform == "linux":
        assert 0 <= child.cpu_seconds() < 60


@pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc")
def test_a_paused_child_does_nothing_and_ends_with_the_rest(child):
    child.ask("spin")
    child.pause()
    time.sleep(0.02)
    before = child.cpu_seconds()
    time.sleep(0.1)
    assert child.cpu_seconds() == before
    child.resume()
    assert child.ask("echo", a=2) == {"a": 2}
    child.pause()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_paused_child_does_not_outlive_a_killed_parent(module, tmp_path, child):
    code = (
        "import os, signal, sys; from benchmarks.child import Child; "
        "one = Child('echo_child', sys.argv[1]); one.ask('echo'); one.pause(); "
        "print(one._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")], capture_output=True, text=True
    )
    assert parent.returncode == -9
    for _ in range(100):
        if gone(int(parent.stdout)):
            return
        time.sleep(0.05)
    pytest.fail("the paused process has not ended")


def gone(pid):
    """Return whether a process has ended, even if no parent has collected its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_child_that_ends_is_said_to_have_ended(child):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ends: the process ended"):
            child.ask("ends")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_peak_of_memory_starts_again(module):
    big = torch.ones(2**26, dtype=torch.uint8)
    peak = module("child").memory_bytes()["peak"]
    del big
    if not module("child").forget_the_peak():
        pytest.skip("no access to clear_refs")
    after = module("child").memory_bytes()
    assert after["now"] <= after["peak"] <= peak


def answer(command, arguments):
    if command == "memory":
        return {"now": 1, "peak": 2}
    times = [[0.1 * (1 + token) for token in range(arguments["new"])]] * arguments["rows"]
    return {"times": times, "tokens": [[1] * len(row) for row in times]}


def test_rounds_ask_everything_of_everybody_in_another_order(module, monkeypatch):
    rounds, asked = module("serving.rounds"), []
    monkeypatch.setattr(module("turns"), "SETTLE", 0)
    turns = rounds.Turns("nowhere", lambda line: None)
    turns.children = {name: Answers(name, asked, answer) for name in rounds.ENGINES}
    turns.engines = {
        name: {"arguments": {"enable_lora": name != rounds.WITHOUT}} for name in rounds.ENGINES
    }
    given = module("serving.workloads").workloads(3)
    found = turns.run(given, rounds=2)
    bases = sum(not one.uses_adapters for one in given)
    assert len(found) == 2 * len(given) + bases
    assert all(len(one["rounds"]) == 2 and one["cold"] for one in found)
    assert_only_who_runs_goes_on(asked)
    asked = [one for one in asked if one[1] == "run"]
    each = len(found)
    order = [json.dumps(asked[start : start + each]) for start in range(0, 3 * each, each)]
    assert len(set(order)) == 3
    assert all(not any(arguments["adapters"].count(number) for number in range(16))
               for name, _, arguments in asked if name == rounds.WITHOUT)  # fmt: skip
    turns.note()
    assert turns.engines["stock"]["idle_share"] > 0.01
