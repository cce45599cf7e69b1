"""The verdict on one result: its form, its classes, each error, and all errors together.

In this order, and the first that fails is the finding: type, dtype and shape; NaN and infinity;
every element within its bound; the rms error at most twice that of the eager yardstick. There is
no relative tolerance anywhere: where terms cancel it would refuse right results, and elsewhere it
would let wrong ones pass.

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
    "rms_of",
    "rms_rule",
]

RMS_FACTOR = 2.0
RMS_ELEMENTS = 512  # with fewer, the rms of honest errors can differ by more than that
OVERFLOW_MARGIN = 1.01  # what is nearer to the largest number may be rounded either way


@dataclass(frozen=True, eq=False)
class Finding:
    """Why a result is wrong.

    Args:
        rule: "call", "form", "class", "equal", "bound", "rms", "bias", "repeat", "kept" or
            "modified".
        message: a sentence with the numbers.
        wrong: bool, the shape of the result: which elements; None where no element is.
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
        answer: what it is held against.
        equal: whether the exact answer is demanded.
        yardstick: the rms error of the same maths done eagerly, or None for no such rule.
    """
    form = _form(result, answer)
    if form is not None or not isinstance(result, Tensor):
        return form
    result = result.detach()
    if not answer.exact.is_floating_point():
        wrong = result != answer.exact
        return _finding("equal", wrong, result, answer, "differs from the integer that is right")
    found = _classes(result, answer)
    if found is not None:
        return found
    demanded = equal or not bool(answer.bound.any())
    if demanded:
        return _equality(result, answer)
    error = error_of(result, answer)
    beyond = ~(error <= answer.bound)
    if bool(beyond.any()):
        ratio = torch.where(beyond, error / answer.bound, 0.0)
        return _finding("bound", beyond, result, answer, f"is {ratio.max():.3g} bounds away")
    return rms_rule(result, answer, yardstick)


def error_of(result: Tensor, answer: Answer) -> Tensor:
    """Return how far a result is from the exact answer; 0 where it has no bound."""
    error = (result.double() - answer.exact.double()).abs()
    return torch.where(answer.bound.isinf() | error.isnan(), 0.0, error)


def rms_of(error: Tensor) -> float:
    """Return the root of the mean square."""
    return float(error.square().mean().sqrt()) if error.numel() else 0.0


def _form(result: object, answer: Answer) -> Finding | None:
    if not isinstance(result, Tensor):
        return Finding("form", f"returned {type(result).__name__}, not a tensor")
    if result.dtype != answer.dtype:
        return Finding("form", f"returned {result.dtype}, not {answer.dtype}")
    if result.shape != answer.exact.shape:
        return Finding("form", f"returned {[*result.shape]}, not {[*answer.exact.shape]}")
    if result.device != answer.exact.device:
        return Finding("form", f"returned on {result.device}, not {answer.exact.device}")
    return None


def _classes(result: Tensor, answer: Answer) -> Finding | None:
    """Return a finding where a result is NaN, infinite or finite and must not be."""
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
    right |= unbounded & within  # a number on the way may overflow
    if answer.free is not None:
        right |= answer.free
    return _finding("class", ~right, result, answer, "must be")


def _equality(result: Tensor, answer: Answer) -> Finding | None:
    exact = answer.exact.to(result.dtype)
    same = (result == exact) | (result.isnan() & exact.isnan())
    if answer.exact.dtype == result.dtype:  # a weight, whose zeros have signs
        same &= (result != 0) | (result.signbit() == exact.signbit())
    return _finding("equal", ~same, result, answer, "must be exactly")


def rms_rule(result: Tensor, answer: Answer, yardstick: float | None) -> Finding | None:
    """Return a finding if the rms error is more than twice the yardstick's.

    Args:
        result: what the backend returned.
        answer: what it is held against.
        yardstick: the rms error of the same maths done eagerly, or None for no such rule.
    """
    judged = answer.bound.isfinite()
    if yardstick is None or int(judged.sum()) < RMS_ELEMENTS:
        return None
    ours = rms_of(error_of(result, answer)[judged])
    if ours <= RMS_FACTOR * yardstick:
        return None
    times = ours / yardstick if yardstick else float("inf")
    return Finding(
        "rms",
        f"the rms error is {ours:.3g}, {times:.3g} times that of the same maths done eagerly, "
        f"{yardstick:.3g}; no element is beyond its bound",
    )


def _finding(rule: str, wrong: Tensor, result: Tensor, answer: Answer, says: str) -> Finding | None:
    if not bool(wrong.any()):
        return None
    at = tuple(int(one) for one in wrong.nonzero()[0])
    got, want = result[at].item(), answer.exact[at].item()
    count = f"{int(wrong.sum())} of {wrong.numel()} elements are wrong; "
    return Finding(rule, f"{count}{[*at]} is {got}, {says}: exact is {want}", wrong)
