"""Let child processes work in turn: while a child answers, the others are stopped.

A waiting engine can use 1 to 3 % of a processor, because threads of its libraries poll for work a
hundred times a second.
"""

import random
import time

__all__ = ["BUSY", "SETTLE", "Turns", "shuffled"]

SETTLE = 0.05  # seconds between resuming a child and its command
BUSY = 0.01  # the largest share of a processor that an idle child may use


class Turns:
    """The child processes, by name; all of them are stopped between two commands."""

    def __init__(self):
        self.children = {}
        self._idle = {}  # by child: CPU seconds while others ran, and how long those ran

    def ask(self, name, command, /, **arguments):
        """Send a command to a child and return its answer, with the other children stopped."""
        self.children[name].resume()
        time.sleep(SETTLE)
        idle = {other: child for other, child in self.children.items() if other != name}
        before = {other: child.cpu_seconds() for other, child in idle.items()}
        started = time.perf_counter()
        answer = self.children[name].ask(command, **arguments)
        passed = time.perf_counter() - started
        self.children[name].pause()
        for other, start in before.items():
            if start is not None:
                used, waited = self._idle.get(other, (0.0, 0.0))
                now = idle[other].cpu_seconds()
                self._idle[other] = (used + now - start, waited + passed)
        return answer

    def idle_share(self, name):
        """Return the share of a processor that a child used while others ran; None if unknown."""
        used, passed = self._idle.get(name, (0.0, 0.0))
        return used / passed if passed else None

    def close(self):
        """End the children."""
        for child in self.children.values():
            child.close()


def shuffled(keys, rounds, seed):
    """Yield the number of each round and its keys, in a new random order in each round.

    Args:
        keys: the keys.
        rounds: the number of rounds after the round 0, which is not to be measured.
        seed: of the random order.
    """
    order, rng = list(keys), random.Random(seed)
    for number in range(rounds + 1):
        rng.shuffle(order)
        yield number, tuple(order)
