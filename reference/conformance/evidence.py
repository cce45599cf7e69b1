"""The evidence behind an outcome: how close results came to their bounds, and the call that failed.

It is gathered only for reports, since the exact answer of every call is computed once more.

Source: ``docs/commands/conform.md``, "--report".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import Answer
from int4_lora.reference.conformance.judging.check import answer_on_cpu, one_thread
from int4_lora.reference.conformance.judging.systematic_error import MeanError, mean_errors
from int4_lora.reference.conformance.judging.verdict import Finding, error_of
from int4_lora.reference.conformance.procedures import Asked

__all__ = ["Closeness", "Evidence", "JudgedCall", "Witness"]


@dataclass(frozen=True, eq=False)
class JudgedCall:
    """One call whose result has the right form, with the answer it was held against.

    Args:
        operands: the arguments.
        result: what the backend returned, on the CPU.
        held: the exact answer and its bound.
        finding: what is wrong, or None.
    """

    operands: Operands
    result: Tensor
    held: Answer
    finding: Finding | None


@dataclass(frozen=True)
class Closeness:
    """How close the results of a case came to their bounds.

    Args:
        calls: the number of results.
        elements: the number of elements with a finite, positive bound; 0 if all must be equal.
        largest: the largest error / bound among them.
        means: the mean of error / bound, and the mean away from zero; empty for few elements.
    """

    calls: int
    elements: int
    largest: float
    means: tuple[MeanError, ...]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the calls of one case have shown.

    Args:
        closeness: over all calls with a result of the right form; None if there was none.
        failure: the call that failed, if its result has the right form, or None.
    """

    closeness: Closeness | None
    failure: JudgedCall | None


class Witness:
    """Collects the evidence of a case from its calls.

    Args:
        function: the function that is called.
    """

    def __init__(self, function: str) -> None:
        self.function = function
        self._failure: JudgedCall | None = None
        self._calls = 0
        self._largest = 0.0
        self._judged: list[tuple[Tensor, Tensor, Tensor]] = []  # errors, exact answers, bounds

    def see(self, asked: Asked) -> None:
        """Take in a call, unless its result has the wrong form."""
        result, operands = asked.result, asked.operands
        form = asked.finding is not None and asked.finding.rule == "form"
        if form or not isinstance(result, Tensor) or result.device != operands.device:
            return
        with one_thread():
            held = answer_on_cpu(self.function, operands, asked.manifest)
        if result.shape != held.exact.shape or result.dtype != held.dtype:
            return  # a result that shares memory is not yet known to have the right form
        result = result.detach().to("cpu").clone()
        self.add(JudgedCall(operands.to("cpu"), result, held, asked.finding))

    def add(self, call: JudgedCall) -> None:
        """Take in a call whose exact answer is known."""
        if call.finding is not None:
            self._failure = call
        self._calls += 1
        if not call.held.exact.is_floating_point():
            return
        bound = call.held.bound
        counted = bound.isfinite() & (bound > 0) & call.result.isfinite()
        distance, allowed = error_of(call.result, call.held)[counted], bound[counted]
        if allowed.numel():
            self._largest = max(self._largest, float((distance / allowed).max()))
        exact = call.held.exact[counted].double()
        self._judged.append((call.result[counted].double() - exact, exact, allowed))

    def evidence(self) -> Evidence:
        """Return the evidence of the calls."""
        if not self._calls:
            return Evidence(None, None)
        parts = [torch.cat(columns) for columns in zip(*self._judged, strict=True)]
        elements = parts[0].numel() if parts else 0
        means = mean_errors(*parts) if parts else ()
        return Evidence(Closeness(self._calls, elements, self._largest, means), self._failure)
