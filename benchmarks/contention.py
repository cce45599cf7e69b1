"""Measure with the machine to ourselves and beside busy processes, by turns.

A busy process computes in one thread without end; it is stopped while the quiet half is measured.
Kernels that end in a barrier wait for their slowest thread, so other work slows contenders by
different factors, and a factor is comparable only with that of the dense layer in the same row.

Source: ``signal(7)`` for stopping a process.
"""

import contextlib
import threading
import time

from benchmarks.child import STOPS, Child, serve
from benchmarks.turns import SETTLE
from int4_lora.compiled.selection.timing import Times, measure

__all__ = ["STOPS", "BusyProcesses", "measure_by_turns"]

TURNS = 4  # of each half


class BusyProcesses:
    """Processes that compute without end while they are not stopped.

    Args:
        count: the number of processes.
        folder: the folder of their logs.
    """

    def __init__(self, count, folder):
        self.children = []
        for number in range(count):
            child = Child("benchmarks.contention", folder / f"busy-{number}.log")
            self.children.append(child)
            child.ask("compute")
            child.pause()

    @contextlib.contextmanager
    def at_work(self):
        """Let the processes compute within the context."""
        try:
            for child in self.children:
                child.resume()
            time.sleep(SETTLE)
            yield
        finally:
            for child in self.children:
                child.pause()

    def close(self):
        """End the processes."""
        for child in self.children:
            child.close()


def measure_by_turns(callables, busy, *, rounds, budget):
    """Time callables quiet and beside busy processes, each in ``TURNS`` turns.

    Args:
        callables: functions by name, as ``measure`` takes them.
        busy: the BusyProcesses.
        rounds: the most rounds of each half.
        budget: the most seconds of both halves together.

    Returns:
        The ``Times`` by name of the quiet half, and those of the other half.
    """
    halves = ({name: [] for name in callables}, {name: [] for name in callables})
    each = {"rounds": max(1, rounds // TURNS), "budget": budget / TURNS / 2}
    for turn in range(TURNS):
        for half, context in zip(halves, (contextlib.nullcontext(), busy.at_work()), strict=True):
            with context:
                for name, times in measure(callables, **each, seed=turn).items():
                    half[name] += times.seconds
    quiet, beside = ({name: Times(seconds) for name, seconds in half.items()} for half in halves)
    return quiet, beside


def _compute():
    def work():
        while True:
            pass

    threading.Thread(target=work, daemon=True).start()


if __name__ == "__main__":
    serve({"compute": _compute})
