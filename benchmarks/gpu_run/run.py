"""What the parts of a run share: options, the machine, the time left, the fastest so far."""

import argparse
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.operands import Layer
from int4_lora.compiled import prepare
from int4_lora.compiled.formulations import FORMULATIONS
from int4_lora.compiled.selection.choice import default

__all__ = ["Run", "seconds"]

FORMULATION = "formulation "  # before the name of a formulation, in a row of the layer benchmark


def seconds(text):
    """Return the seconds that an argument names: 90, 90s or 5m.

    Example:
        >>> seconds("5m"), seconds("1.5")
        (300.0, 1.5)
    """
    number = re.fullmatch(r"(\d+(?:\.\d+)?)([sm]?)", text)
    if number is None:
        raise argparse.ArgumentTypeError(f"a number of seconds, or minutes as in 5m, got {text!r}")
    return float(number[1]) * (60 if number[2] == "m" else 1)


@dataclass
class Run:
    """The state of a run.

    Args:
        options: the layer benchmark's options, and ``cases``.
        host: returned by ``machine``.
        folder: the folder of the results.
        deadline: the time by ``time.perf_counter`` after which the part begins nothing more.
        cells: the rows of the layer benchmark.
        fastest_launches: the formulations with the fastest launches of the sweep, by name.
    """

    options: object
    host: dict
    folder: Path
    deadline: float = float("inf")
    cells: list = field(default_factory=list)
    fastest_launches: dict = field(default_factory=dict)

    def late(self):
        """Return whether the part's time is up."""
        return time.perf_counter() > self.deadline

    def layer(self, tokens):
        """Return the operands of the first shape."""
        options = self.options
        dtype = getattr(torch, options.dtypes[0])
        return Layer(*options.shapes[0], tokens, dtype, options.group_size, options.device)

    def fastest(self, tokens, among=FORMULATIONS):
        """Return the formulation that was measured fastest with the first shape, or None.

        Args:
            tokens: rows of x.
            among: the names to choose from.
        """
        times = {
            name.removeprefix(FORMULATION): milliseconds
            for row in self.cells
            if (row["rows"], row["columns"]) == self.options.shapes[0] and row["tokens"] == tokens
            for name, milliseconds in row["milliseconds"].items()
            if name.startswith(FORMULATION)
        }
        able = [name for name in times if name in among]
        return FORMULATIONS[min(able, key=times.get)] if able else None

    def leading(self):
        """Return the formulations to judge: the fastest, the defaults, the fastest launches."""
        chosen, layer = {}, self.layer(1)
        weight = prepare(layer.weight)
        for tokens in self.options.tokens:
            usual = default(weight, layer.dtype, tokens)
            for formulation in (usual, self.fastest(tokens)):
                if formulation is not None:
                    chosen[formulation.name] = formulation
        return list({**chosen, **self.fastest_launches}.values())
