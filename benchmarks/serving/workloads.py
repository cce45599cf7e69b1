"""Define the requests to the engines: prefill, many tokens at once, and decode, token by token.

Rows are requests that arrive at the same time. Each shape also runs without adapters.

Source: ``benchmarks/results/README.md``.
"""

import statistics
from dataclasses import dataclass

ADAPTERS = 16
MIXES = {
    "base": lambda row: None,
    "1 adapter": lambda row: 0,
    "4 adapters": lambda row: row % 4,
    "16 adapters": lambda row: row % ADAPTERS,
    "mixed": lambda row: None if row % 2 else row // 2 % 4,  # every second row has no adapter
    "base, 4 at a time": lambda row: None,  # as 16 adapters run in four slots
}
AT_A_TIME = {"base, 4 at a time": 4}


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at the same time, or a few at a time.

    Args:
        kind: "prefill" or "decode".
        rows: the number of requests.
        prompt: the number of tokens of each prompt.
        new: the number of tokens to generate for each request.
        mix: the adapters of the rows, one of ``MIXES``.
    """

    kind: str
    rows: int
    prompt: int
    new: int
    mix: str

    @property
    def shape(self):
        """The workload's name in tables, without the adapters."""
        if self.kind == "prefill":
            return f"prefill, {self.rows} x {self.prompt}"
        return f"decode, {self.rows} row{'s' if self.rows > 1 else ''}"

    @property
    def name(self):
        """The workload's name in tables."""
        return f"{self.shape}, {self.mix}"

    @property
    def adapters(self):
        """The adapter of each row, or None."""
        return [MIXES[self.mix](row) for row in range(self.rows)]

    @property
    def uses_adapters(self):
        """Whether a row has an adapter."""
        return any(adapter is not None for adapter in self.adapters)

    @property
    def at_a_time(self):
        """The number of rows that arrive together; the next rows arrive when these have ended."""
        return AT_A_TIME.get(self.mix, self.rows)

    @property
    def judged(self):
        """The measure for the ratios.

        Sixteen adapters share fewer slots, so the engine serves a few rows at a time, and their
        tokens come faster. So with sixteen rows the ratios use the total time.
        """
        return "itl" if self.kind == "decode" and self.rows < ADAPTERS else "seconds"


def workloads(new, quick=False):
    """Return the workloads.

    Args:
        new: the number of tokens that each row decodes after its first.
        quick: whether to use fewer tokens, for a tiny model.
    """
    tokens = 64 if quick else 512
    shapes = [
        ("prefill", 8, tokens // 8, 1, ("base", "1 adapter", "4 adapters", "mixed")),
        ("prefill", 16, tokens // 16, 1, ("base", "16 adapters")),
        ("decode", 1, 4, 1 + new, ("base", "1 adapter")),
        ("decode", 8, 4, 1 + new, ("base", "1 adapter", "4 adapters", "mixed")),
        ("decode", 16, 4, 1 + new, ("base", "base, 4 at a time", "16 adapters")),
    ]
    return [Workload(*shape, mix) for *shape, mixes in shapes for mix in mixes]


def measures(workload, times):
    """Return the measures of a run.

    Args:
        workload: the requests.
        times: for each row, the seconds from the start to each of its tokens.

    Returns:
        ``seconds``, the time to the last token; ``ttft``, the median row's time to its first token;
        ``itl``, the mean time from a token to the next, or None if each row has one token; and
        ``tokens_per_second``, counting the prompts' tokens in a prefill, else the answers' tokens.

    Raises:
        ValueError: a row's number of tokens is not the requested number.
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
