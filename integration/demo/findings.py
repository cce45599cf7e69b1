"""What a demo run found, and the rules that decide whether it is right.

The truth for a row is transformers + PEFT with the row's adapter alone, in float64, on the weights
that compressed-tensors decompresses. The rules:

- float64: ``max |ours - truth| <= 1e-9 * max |truth|`` for each row
- low precision: ``rms(ours - truth) <= 2 * rms(theirs - truth) + floor`` for each row, where
  theirs is eager transformers + PEFT in the same dtype, and floor = u / 2 * rms(truth) with the
  dtype's unit roundoff u: a quarter of a unit in the last place of the logits
- the oracle finds nothing against any output of any quantised linear, given the exact result by
  upstream's weight and PEFT's formula, and every output has a finite ``error_bound``
- where vLLM can serve the batch: the log-probabilities that our backend gives after each row err
  by at most twice the error of transformers + PEFT, plus 0.02 nats

The factor 2 is the oracle's ``RMS_FACTOR``.

Source: ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from int4_lora.integration.demo.served import Served
from int4_lora.reference.conformance.judging.verdict import RMS_FACTOR

__all__ = ["FLOAT64_LIMIT", "Comparison", "Row"]

FLOAT64_LIMIT = 1e-9


@dataclass(frozen=True)
class Row:
    """What was found for one row of the batch.

    Args:
        adapter: the row's adapter, or "base".
        float64_error: the largest error in float64, relative to the largest logit.
        ours: the rms error of the reference in low precision, in logits.
        theirs: the rms error of transformers + PEFT in low precision, in logits.
        floor: the error allowed beyond twice theirs, in logits.
    """

    adapter: str
    float64_error: float
    ours: float
    theirs: float
    floor: float

    @property
    def allowed(self) -> float:
        """The largest ``ours`` that is right, in logits."""
        return RMS_FACTOR * self.theirs + self.floor

    @property
    def right(self) -> bool:
        """Whether both rules hold; NaN breaks them."""
        return self.float64_error <= FLOAT64_LIMIT and self.ours <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """What one demo run found.

    Args:
        rows: the rows of the batch.
        linears: the number of quantised linears in the model.
        elements: the number of their outputs that were judged.
        unbounded: the number of these outputs that have no bound because they may overflow; any
            makes the run wrong.
        worst_of_bound: the largest error of these outputs, as a fraction of its bound.
        wrong_linear: the oracle's first finding against a linear, or None.
        packed_bytes: the size of the packed weights.
        dense_bytes: the size of the same weights in 16 bits.
        adapter_bytes: the size of all adapters, as stored.
        our_seconds: the time of one mixed batch by the reference, in low precision.
        their_seconds: the time of the same rows by transformers + PEFT, one after the other.
        dtype: the low precision.
        served: what vLLM did with the batch.
    """

    rows: Sequence[Row]
    linears: int
    elements: int
    unbounded: int
    worst_of_bound: float
    wrong_linear: str | None
    packed_bytes: int
    dense_bytes: int
    adapter_bytes: int
    our_seconds: float
    their_seconds: float
    dtype: str
    served: Served

    @property
    def right(self) -> bool:
        """Whether every rule holds, and there was something to judge."""
        linears = self.elements > 0 and self.unbounded == 0 and self.wrong_linear is None
        rows = len(self.rows) > 0 and all(row.right for row in self.rows)
        return linears and rows and self.served.right
