"""The results of a demo run, and the rules that decide whether they are right.

The truth for a row is transformers + PEFT with the row's adapter alone, in float64, on the weights
that compressed-tensors decompresses. The rules:

- float64: ``max |ours - truth| <= 1e-9 * max |truth|`` for each row
- low precision: ``rms(ours - truth) <= 2 * rms(theirs - truth) + floor`` for each row, where
  theirs is eager transformers + PEFT in the same dtype, and floor = u / 2 * rms(truth) with the
  dtype's unit roundoff u: a quarter of a unit in the last place of the logits
- linears: the oracle accepts every output of every quantised linear, judged against the exact
  result by compressed-tensors' weight and PEFT's formula, and every output has a finite
  ``error_bound``
- where vLLM can serve the batch: the largest error of our backend's log-probabilities after each
  row is at most twice the largest error of transformers + PEFT, plus 0.02 nats

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
    """The errors of one row of the batch.

    Args:
        adapter: the row's adapter, or "base".
        float64_error: the largest error in float64, relative to the largest logit.
        ours: the rms error of the reference in low precision, in logits.
        theirs: the rms error of transformers + PEFT in low precision, in logits.
        floor: the error allowed in addition to twice ``theirs``, in logits.
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
        """Whether the float64 and the low-precision rule hold; NaN breaks them."""
        return self.float64_error <= FLOAT64_LIMIT and self.ours <= self.allowed


@dataclass(frozen=True)
class Comparison:
    """The results of one demo run.

    Args:
        rows: the rows of the batch.
        linears: the number of quantised linears in the model.
        elements: the number of judged outputs of these linears.
        unbounded: the number of judged outputs that have no bound because they may overflow; the
            run is right only if it is 0.
        worst_of_bound: the largest ratio of a judged output's error to its bound.
        wrong_linear: the oracle's first finding against a linear, or None.
        packed_bytes: the size of the packed weights.
        dense_bytes: the size of the same weights in 16 bits.
        adapter_bytes: the size of all adapters, as stored.
        our_seconds: the time of one mixed batch through the reference, in low precision.
        their_seconds: the time of the same rows through transformers + PEFT, one after the other.
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
        """Whether every rule holds, with at least one row and one judged output."""
        linears = self.elements > 0 and self.unbounded == 0 and self.wrong_linear is None
        rows = len(self.rows) > 0 and all(row.right for row in self.rows)
        return linears and rows and self.served.right
