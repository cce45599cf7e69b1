"""Whether a result is what sums kept in 16 bits give.

The order of such sums is unknown, so they cannot be reproduced bit for bit. What can: every
element is within the bound of 16-bit sums; the sizes of the errors are spread as those of 16-bit
sums emulated in several orders, at three quantiles, and not as those of float32 sums; and they go
both ways. One wrong element, a wrong row or a shift of all elements are not like
that.

Source: ``docs/numerics.md``; the orders are those of GEMMs in the field: one after the other, and
blocks that are summed in float32 and added up in 16 bits (split-K with atomics).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from int4_lora.reference import dequantize
from int4_lora.reference.bounds import FORMATS
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import Answer, answer
from int4_lora.reference.conformance.judging.systematic_error import bias_of_errors
from int4_lora.reference.conformance.judging.yardstick import one_by_one, yardstick
from int4_lora.reference.conformance.manifest import Manifest

__all__ = ["accumulated_low"]

FACTOR = 2.0
EXCESS = 1.2  # over the errors of float32 sums, in one of the quantiles
QUANTILES = (0.5, 0.9, 0.99)
LARGEST = 4.0  # times the largest emulated error, where quantiles say nothing
BLOCKS = (16, 32, 64, 128)
ELEMENTS = 256  # with fewer, quantiles say little


def accumulated_low(
    function: str, operands: Operands, result: Tensor, manifest: Manifest
) -> bool | None:
    """Return whether sums kept in float16 or bfloat16 explain a result.

    Args:
        function: what was called; only layers are looked at.
        operands: with what, on the CPU.
        result: what it returned.
        manifest: the roundings declared, with wider sums.

    Returns:
        True if they reproduce its errors, None if it is within the bound of such sums but has too
        few elements to tell, else False.
    """
    if operands.x is None or operands.weight is None or manifest.accumulate != torch.float32:
        return False
    verdicts = [
        _fits(function, operands, result, manifest, dtype)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    return True if True in verdicts else None if None in verdicts else False


def _fits(
    function: str, operands: Operands, result: Tensor, manifest: Manifest, dtype: torch.dtype
) -> bool | None:
    x, weight = operands.x, operands.weight
    if x is None or weight is None:
        return False
    held = answer(function, operands, manifest)
    low = dataclasses.replace(manifest, accumulate=dtype, base_rounded=True)
    dense = dequantize(weight, torch.float64)
    casts = 4 * FORMATS[dtype].u * (x.double().abs() @ dense.abs().T)
    bound = answer(function, operands, low).bound + casts
    judged = held.bound.isfinite() & result.isfinite()
    error = (result.double() - held.exact).abs()
    if bool((~result.isfinite() & bound.isfinite()).any()):
        return False  # not finite where 16-bit sums are
    if not bool((error <= bound)[judged].all()):
        return False
    delta = held.exact - x.double() @ dense.T  # with bias
    emulated = [(y.double() + delta).to(x.dtype) for y in _sums(x, dense.float(), dtype)]
    if not bool(judged.any()):
        return False
    if int(judged.sum()) < ELEMENTS:
        largest = max(float((y.double() - held.exact).abs()[judged].amax()) for y in emulated)
        return None if float(error[judged].amax()) <= LARGEST * largest else False

    spread = _Spread(held, judged)
    ours, usual = spread(result), spread(yardstick(function, operands, manifest))
    if not any(own > EXCESS * other for own, other in zip(ours, usual, strict=True)):
        return False
    if bias_of_errors((result.double() - held.exact)[judged], held.exact[judged], bound[judged]):
        return False
    return any(
        all(
            other / FACTOR <= own <= other * FACTOR for own, other in zip(ours, theirs, strict=True)
        )
        for theirs in map(spread, emulated)
    )


class _Spread:
    """Sizes of errors, in bounds, at ``QUANTILES``."""

    def __init__(self, held: Answer, judged: Tensor) -> None:
        self.held = held
        self.judged = judged

    def __call__(self, y: Tensor) -> list[float]:
        counted = self.judged & y.isfinite()
        sizes = ((y.double() - self.held.exact).abs() / self.held.bound)[counted]
        return [_quantile(sizes, part) for part in QUANTILES]


def _quantile(values: Tensor, part: float) -> float:
    return float(values.sort().values[int(part * (len(values) - 1))]) if len(values) else 0.0


def _sums(x: Tensor, dense: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield x W^T with sums in ``dtype``, in several orders."""
    wide = x.to(torch.float32)
    yield one_by_one(x.to(dtype), dense.to(dtype))
    for size in BLOCKS:
        if x.shape[1] < 2 * size:
            continue
        total = torch.zeros(x.shape[0], len(dense), dtype=dtype)
        for start in range(0, x.shape[1], size):
            columns = slice(start, start + size)
            total += (wide[:, columns] @ dense[:, columns].T).to(dtype)
        yield total
