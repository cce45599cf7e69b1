"""What the engines are asked: many tokens at once, and one token after another.

Rows are requests that are there at the same moment. Each mix of adapters has a run without any of
the same rows beside it.

Source: the bars are those of the issue, "Serving benchmark": 512 tokens of prompts, and 8 rows.
"""

import statistics
from dataclasses import dataclass

ADAPTERS = 16
MIXES = {
    "base": lambda row: None,
    "1 adapter": lambda row: 0,
    "4 adapters": lambda row: row % 4,
    "16 adapters": lambda row: row % ADAPTERS,
    "mixed": lambda row: None if row % 2 else row // 2 % 4,  # every other row without one
}


@dataclass(frozen=True)
class Workload:
    """Some requests at once.

    Args:
        kind: "prefill" or "decode".
        rows: how many requests.
        prompt: tokens of each prompt.
        new: tokens that each asks for.
        mix: which adapters, one of ``MIXES``.
    """

    kind: str
    rows: int
    prompt: int
    new: int
    mix: str

    @property
    def shape(self):
        """Everything but the adapters, as tables call it."""
        if self.kind == "prefill":
            return f"prefill, {self.rows} x {self.prompt}"
        return f"decode, {self.rows} row{'s' if self.rows > 1 else ''}"

    @property
    def name(self):
        """As tables call it."""
        return f"{self.shape}, {self.mix}"

    @property
    def adapters(self):
        """The adapter of each row, None for none."""
        return [MIXES[self.mix](row) for row in range(self.rows)]

    @property
    def judged(self):
        """The measure that ratios are taken of.

        Sixteen adapters that share fewer slots are served in turns, a few rows at a time, whose
        tokens come faster; there the whole time is what tells.
        """
        return "itl" if self.kind == "decode" and self.rows < ADAPTERS else "seconds"


def workloads(new, quick=False):
    """Return the workloads.

    Args:
        new: tokens that each row decodes after its first.
        quick: fewer tokens, for a tiny model.
    """
    tokens = 64 if quick else 512
    shapes = [
        ("prefill", 8, tokens // 8, 1, ("base", "1 adapter", "4 adapters", "mixed")),
        ("prefill", 16, tokens // 16, 1, ("base", "16 adapters")),
        ("decode", 1, 4, 1 + new, ("base", "1 adapter")),
        ("decode", 8, 4, 1 + new, ("base", "1 adapter", "4 adapters", "mixed")),
        ("decode", 16, 4, 1 + new, ("base", "16 adapters")),
    ]
    return [Workload(*shape, mix) for *shape, mixes in shapes for mix in mixes]


def measures(workload, times):
    """Return what a run says.

    Args:
        workload: what was run.
        times: for each row, the seconds after the start at which each of its tokens was there.

    Returns:
        ``seconds`` until everything was there; ``ttft``, the median row's time to its first token;
        ``itl``, from a token to the next, the mean over the run, or None where there is no next;
        ``tokens_per_second``, of the prompts in a prefill, else of the answers.

    Raises:
        ValueError: tokens are missing.
    """
    counts = [len(row) for row in times]
    if counts != [workload.new] * workload.rows:
        raise ValueError(f"{workload.name}: {workload.new} tokens a row were asked, got {counts}")
    seconds = max(row[-1] for row in times)
    steps = workload.new - 1
    each = workload.prompt if workload.kind == "prefill" else workload.new
    return {
        "seconds": seconds,
        "ttft": statistics.median(row[0] for row in times),
        "itl": statistics.mean((row[-1] - row[0]) / steps for row in times) if steps else None,
        "tokens_per_second": workload.rows * each / seconds,
    }
