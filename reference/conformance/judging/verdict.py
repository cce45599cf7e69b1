"""The verdict on one result, and every tolerance that it uses.

Checked in this order, the first failure is the finding: type, dtype and shape; NaN and infinity;
each element against its bound; the rms error against twice that of the yardstick. There is no
relative tolerance: where terms cancel it would reject correct results, and elsewhere it would
accept wrong ones.

Source: ``docs/conformance.md``; the order is that of TOSA and of flash-attention's tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference.bounds import FORMATS
from int4_lora.reference.conformance.judging.answers import Answer

__all__ = [
    "RMS_ELEMENTS",
    "RMS_FACTOR",
    "Finding",
    "error_of",
    "judge",
    "plain_tensor",
    "rms_of",
    "rms_rule",
]

RMS_FACTOR = 2.0
RMS_ELEMENTS = 512  # with fewer, chance alone can exceed the factor
OVERFLOW_MARGIN = 1.01  # results this near to the largest number may round either way


@dataclass(frozen=True, eq=False)
class Finding:
    """Why a result is wrong.

    Args:
        rule: "call", "crash", "hang", "modified", "form", "class", "equal", "bound", "rms",
            "memory", "systematic_error", "repeat" or "kept".
        message: a sentence with the numbers.
        wrong: bool, of the result's shape: the wrong elements; None where it is about none.
    """

    rule: str
    message: str
    wrong: Tensor | None = None


def judge(
    result: object, answer: Answer, *, equal: bool, yardstick: float | None
) -> Finding | None:
    """Return the first finding against a result, or None.

    Args:
        result: what the backend returned.
        answer: the exact answer and its bound.
        equal: whether the result must be the exact answer.
        yardstick: the yardstick's rms error, or None for no rms rule.
    """
    form = _form(result, answer)
    if form is not None or not isinstance(result, Tensor):
        return form
    result = result.detach()
    if not answer.exact.is_floating_point():
        wrong = result != answer.exact
        return _finding("equal", wrong, result, answer)
    classes = _classes(result, answer)
    if classes is not None:
        return classes
    if equal or not bool(answer.bound.any()):
        return _equality(result, answer)
    error = error_of(result, answer)
    beyond = ~(error <= answer.bound)
    if bool(beyond.any()):
        largest = torch.where(beyond, error / answer.bound, 0.0).max()
        return _finding("bound", beyond, result, answer, f": up to {largest:.3g} bounds away")
    return rms_rule(result, answer, yardstick)


def error_of(result: Tensor, answer: Answer) -> Tensor:
    """Return the distance of a result from the exact answer; 0 where there is no bound."""
    error = (result.double() - answer.exact.double()).abs()
    return torch.where(answer.bound.isinf() | error.isnan(), 0.0, error)


def rms_of(error: Tensor) -> float:
    """Return the root mean square of errors; 0 for none."""
    return float(error.square().mean().sqrt()) if error.numel() else 0.0


def plain_tensor(result: object) -> Finding | None:
    """Return a finding if a result is no tensor, a subclass of Tensor, or not strided, or None."""
    kind = type(result).__name__
    if not isinstance(result, Tensor):
        return Finding("form", f"returned {kind}, not a tensor")
    if type(result) is not Tensor:
        return Finding("form", f"returned {kind}, a subclass of Tensor")
    if result.layout != torch.strided:
        return Finding("form", f"returned the layout {result.layout}, not torch.strided")
    return None


def _form(result: object, answer: Answer) -> Finding | None:
    if not isinstance(result, Tensor):
        return plain_tensor(result)
    if result.dtype != answer.dtype:
        return Finding("form", f"returned {result.dtype}, not {answer.dtype}")
    if result.shape != answer.exact.shape:
        return Finding("form", f"returned {[*result.shape]}, not {[*answer.exact.shape]}")
    if result.device != answer.exact.device:
        return Finding("form", f"returned on {result.device}, not {answer.exact.device}")
    return None


def _classes(result: Tensor, answer: Answer) -> Finding | None:
    """Return a finding where a result is NaN, infinite or finite and should not be."""
    overflow = FORMATS[result.dtype].overflow
    right = torch.zeros_like(result, dtype=torch.bool)
    for exact in answer.loose:
        wide = exact.double()
        infinite = (wide.abs() >= overflow * OVERFLOW_MARGIN) & (wide.sign() == result.sign())
        right |= torch.where(wide.isnan(), result.isnan(), infinite & result.isinf())
        near = wide.abs() >= overflow / OVERFLOW_MARGIN
        right |= (wide.abs() < overflow * OVERFLOW_MARGIN) & (result.isfinite() | near)
    unbounded = answer.exact.double().isfinite() & answer.bound.isinf()
    within = answer.exact.double().abs() < overflow / OVERFLOW_MARGIN
    right |= unbounded & within  # an intermediate number may overflow
    if answer.free is not None:
        right |= answer.free
    return _finding("class", ~right, result, answer)


def _equality(result: Tensor, answer: Answer) -> Finding | None:
    exact = answer.exact.to(result.dtype)
    same = (result == exact) | (result.isnan() & exact.isnan())
    if answer.exact.dtype == result.dtype:  # a weight: the signs of its zeros count
        same &= (result != 0) | (result.signbit() == exact.signbit())
    return _finding("equal", ~same, result, answer)


def rms_rule(result: Tensor, answer: Answer, yardstick: float | None) -> Finding | None:
    """Return a finding if the rms error is more than twice the yardstick's, or None.

    Args:
        result: what the backend returned.
        answer: the exact answer and its bound.
        yardstick: the yardstick's rms error, or None for no rms rule.
    """
    judged = answer.bound.isfinite()
    if yardstick is None or int(judged.sum()) < RMS_ELEMENTS:
        return None
    rms = rms_of(error_of(result, answer)[judged])
    if rms <= RMS_FACTOR * yardstick:
        return None
    times = rms / yardstick if yardstick else float("inf")
    return Finding(
        "rms",
        f"the rms error is {rms:.3g}, {times:.3g} times the yardstick's {yardstick:.3g}; "
        "no element is beyond its bound",
    )


def _finding(
    rule: str, wrong: Tensor, result: Tensor, answer: Answer, detail: str = ""
) -> Finding | None:
    """Return a finding with the first wrong element, or None if no element is wrong."""
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    got, want = result[at].item(), answer.exact[at].item()
    count = f"{int(wrong.sum())} of {wrong.numel()} elements are wrong"
    return Finding(rule, f"{count}; {[*at]} is {got}, the exact answer is {want}{detail}", wrong)
