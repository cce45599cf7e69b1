"""Whether sums kept in 16 bits explain a result.

The order of such sums is unknown, so the result cannot be reproduced bit for bit. Instead: every
element is within the bound of 16-bit sums; at three quantiles, the errors are as large as those of
emulated 16-bit sums in one of several orders, and larger than those of float32 sums; and they have
both signs. One wrong element, row or constant offset does not fit this pattern.

Source: ``docs/numerics.md``. The emulated orders are those of common GEMMs: product after product,
and blocks that are summed in float32 and added up in 16 bits (split-K with atomics).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from int4_lora.reference.bounds import FORMATS
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import Answer, answer
from int4_lora.reference.conformance.judging.systematic_error import systematic_error
from int4_lora.reference.conformance.judging.yardstick import one_by_one, yardstick
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.dequantization import rounded_weight

__all__ = ["accumulated_low"]

FACTOR = 2.0
EXCESS = 1.2  # times the errors of float32 sums, at one of the quantiles
QUANTILES = (0.5, 0.9, 0.99)
LARGEST = 4.0  # times the largest emulated error, where elements are too few for quantiles
BLOCKS = (16, 32, 64, 128)
ELEMENTS = 256  # needed for quantiles


def accumulated_low(
    function: str, operands: Operands, result: Tensor, manifest: Manifest
) -> bool | None:
    """Return whether sums kept in float16 or bfloat16 explain a result.

    Args:
        function: the function that was called; only layers can be explained.
        operands: its arguments, on the CPU.
        result: what it returned.
        manifest: the declared roundings, with wider sums.

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
    dense = rounded_weight(weight).to(torch.float64)
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
    sizes = spread(result)
    usual_sizes = spread(yardstick(function, operands, manifest))
    if not any(size > EXCESS * usual for size, usual in zip(sizes, usual_sizes, strict=True)):
        return False
    if systematic_error((result.double() - held.exact)[judged], held.exact[judged], bound[judged]):
        return False
    return any(
        all(
            low / FACTOR <= size <= low * FACTOR for size, low in zip(sizes, low_sizes, strict=True)
        )
        for low_sizes in map(spread, emulated)
    )


class _Spread:
    """The sizes of a result's errors, as fractions of their bounds, at ``QUANTILES``."""

    def __init__(self, held: Answer, judged: Tensor) -> None:
        self.held = held
        self.judged = judged

    def __call__(self, y: Tensor) -> list[float]:
        counted = self.judged & y.isfinite()
        sizes = ((y.double() - self.held.exact).abs() / self.held.bound)[counted]
        return [_quantile(sizes, fraction) for fraction in QUANTILES]


def _quantile(values: Tensor, fraction: float) -> float:
    return float(values.sort().values[int(fraction * (len(values) - 1))]) if len(values) else 0.0


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
