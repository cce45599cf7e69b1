"""What one demo run found, and the rules it is judged by.

The truth of a row is transformers + PEFT with its adapter alone, in float64, on the weights that
compressed-tensors decompresses. The rules:

- float64: ``max |ours - truth| <= 1e-9 * max |truth|`` for each row
- low precision: ``rms(ours - truth) <= 2 * rms(theirs - truth) + floor`` for each row, theirs
  being eager transformers + PEFT in the same dtype; floor = u / 2 * rms(truth) with the dtype's
  unit roundoff u, a quarter of the logits' own last place
- every output of every quantised linear has a finite ``error_bound`` and lies within it of the
  float64 value that upstream's weight and PEFT's formula give
- where vLLM can serve the batch: our backend's log-probabilities after each row err from the truth
  by at most twice what transformers + PEFT errs, plus 0.02 nats

Source: ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from int4_lora.integration.demo.served import Served

__all__ = ["FLOAT64_LIMIT", "Comparison", "Row"]

FLOAT64_LIMIT = 1e-9


@dataclass(frozen=True)
class Row:
    """What was found for one row of the batch.

    Args:
        adapter: the row's adapter, or "base".
        float64_error: the largest error in float64, relative to the largest logit.
        ours: rms error of the reference in low precision, in logits.
        theirs: rms error of transformers + PEFT in low precision, in logits.
        floor: what is allowed beyond twice theirs, in logits.
    """

    adapter: str
    float64_error: float
    ours: float
    theirs: float
    floor: float

    @property
    def allowed(self) -> float:
        """What ``ours`` may be, in logits."""
        return 2 * self.theirs + self.floor

    @property
    def right(self) -> bool:
        """Whether both rules hold; NaN never does."""
        return self.float64_error <= FLOAT64_LIMIT and self.ours <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """What one demo run found.

    Args:
        rows: one entry for each row of the batch.
        linears: how many quantised linears the model has.
        elements: how many of their outputs were held against ``error_bound``.
        unbounded: how many of them have no bound, because they may overflow; right is 0.
        worst_of_bound: the largest error of one of them over its bound; right up to 1.
        packed_bytes: bytes of the packed weights.
        dense_bytes: bytes the same weights have in 16 bits.
        adapter_bytes: bytes of all adapters, as they are stored.
        our_seconds: one mixed batch, low precision, by the reference.
        their_seconds: the same rows one after the other, by transformers + PEFT.
        dtype: the low precision.
        served: what vLLM did with the batch.
    """

    rows: Sequence[Row]
    linears: int
    elements: int
    unbounded: int
    worst_of_bound: float
    packed_bytes: int
    dense_bytes: int
    adapter_bytes: int
    our_seconds: float
    their_seconds: float
    dtype: str
    served: Served

    @property
    def right(self) -> bool:
        """Whether every rule holds, and something was there to hold it against."""
        bounds = self.elements > 0 and self.unbounded == 0 and self.worst_of_bound <= 1
        rows = len(self.rows) > 0 and all(row.right for row in self.rows)
        return bounds and rows and self.served.right
