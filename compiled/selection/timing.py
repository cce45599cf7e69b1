"""Time several callables side by side: interleaved, shuffled, on operands beyond the cache.

Source: the rules of ``benchmarks/results/README.md``.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Times", "copies_beyond_the_cache", "copy_bandwidth", "measure"]

CACHE_BYTES = {"cpu": 64 * 2**20, "cuda": 128 * 2**20}  # copies of the operands exceed this


@dataclass(frozen=True)
class Times:
    """The times of one callable in one run.

    Args:
        seconds: one time per round, in the order of the rounds.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def copies_beyond_the_cache(nbytes: int, device: str = "cpu") -> int:
    """Return how many copies of an operand exceed the cache together, from 2 to 64."""
    return min(64, max(2, -(-CACHE_BYTES[device] // nbytes)))


def measure(
    callables: Mapping[str, Callable[[int], Any]], *, rounds: int, budget: float, seed: int = 0
) -> dict[str, Times]:
    """Time each callable once per round, in an order shuffled anew in each round.

    Args:
        callables: functions by name. Each takes the number of the round and chooses its operands by
            it, so that none of them is in the cache.
        rounds: the most rounds.
        budget: the most seconds; the first 5 rounds run in any case.
        seed: the seed of the shuffling.

    Returns:
        The ``Times`` by name.
    """
    rng = random.Random(seed)
    names = list(callables)
    for name in names:
        for warm_up in range(3):
            callables[name](warm_up)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 5 and time.perf_counter() - started > budget:
            break
        rng.shuffle(names)
        for name in names:
            _synchronise()
            before = time.perf_counter()
            callables[name](number)
            _synchronise()
            seconds[name].append(time.perf_counter() - before)
    return {name: Times(seconds[name]) for name in callables}


def copy_bandwidth(nbytes: int = 2**28) -> float:
    """Return the bytes per second that the fastest of several copies reads and writes together."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        _synchronise()
        before = time.perf_counter()
        target.copy_(source)
        _synchronise()
        best = min(best, time.perf_counter() - before)
    return 2 * nbytes / best


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
