"""Measure which formulation is fastest for a kind of layer, and store it for ``choice.py``.

At each number of tokens every candidate is timed on the same operands, side by side, on copies of
the weight that exceed the cache. A formulation replaces the default only if it is faster by more
than ``MARGIN``, so that noise does not decide.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedLoRA, PreparedSlice
from int4_lora.compiled.formulations import Formulation
from int4_lora.compiled.graphs.entry import plan
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.selection.choice import (
    AS_USUAL,
    candidates,
    default,
    keep_crossovers,
    takes,
)
from int4_lora.compiled.selection.timing import copies_beyond_the_cache, measure
from int4_lora.disk_cache import cache_folder, check_writable

__all__ = ["TOKENS", "Point", "tune"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MARGIN = 0.03
ROUNDS, BUDGET = 30, 3.0  # the most rounds and the most seconds for one number of tokens


@dataclass(frozen=True)
class Point:
    """The measurements at one number of tokens.

    Args:
        tokens: rows of x.
        milliseconds: the median of each candidate, by name.
        spread: half the interquartile range over the median, by name.
        chosen: the fastest formulation, or the default if none is faster by more than ``MARGIN``.
    """

    tokens: int
    milliseconds: dict[str, float]
    spread: dict[str, float]
    chosen: str


@torch.no_grad()
def tune(
    weight: PreparedWeight,
    dtype: torch.dtype,
    lora: PreparedLoRA | None = None,
    *,
    tokens: Sequence[int] = TOKENS,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Point]:
    """Measure a kind of layer and store the fastest formulations, on disk and for this process.

    Args:
        weight: a weight of the kind: its shape, layout and dtypes matter, its values do not.
        dtype: the dtype of x.
        lora: adapters of the kind that will be used, or None for the base alone.
        tokens: the numbers of rows of x to measure at, ascending; above the last the default stays.
        progress: called with each number of tokens once it is measured.

    Returns:
        One ``Point`` for each number of tokens.

    Raises:
        OSError: the cache folder cannot be written. It is checked before anything is measured; if
            it fails only afterwards, this process still uses the results.
        ValueError: ``tokens`` is empty or does not ascend from 1 or more.

    Example:
        >>> from int4_lora.compiled import prepare
        >>> from int4_lora.reference import quantize
        >>> weight = prepare(quantize(torch.randn(32, 256), group_size=128))
        >>> [point.tokens for point in tune(weight, torch.float32, tokens=[1])]
        [1]
    """
    if not tokens or list(tokens) != sorted(set(tokens)) or tokens[0] < 1:
        raise ValueError(f"tokens must ascend from 1 or more, got {list(tokens)}")
    check_writable()
    slices = () if lora is None else lora.slices
    copies = list(_copies(weight))
    points = []
    for count in tokens:
        points.append(_measured(copies, dtype, count, slices))
        progress(count)
    if not keep_crossovers(weight, dtype, slices, _crossovers(points, weight, dtype, slices)):
        raise OSError(f"{cache_folder()} can no longer be written: kept for this process only")
    return points


def _measured(
    copies: list[PreparedWeight], dtype: torch.dtype, tokens: int, slices: Sequence[PreparedSlice]
) -> Point:
    weight = copies[0]
    generator = torch.Generator(device="cpu").manual_seed(tokens)
    x = torch.randn(tokens, weight.in_features, generator=generator).to(weight.device, dtype)
    ids = None
    if slices:
        ids = (torch.arange(tokens) % slices[0].adapters).to(weight.device)
    taken = candidates(weight, dtype, tokens, slices)
    callables = {one.name: _call(one, x, copies, slices, ids) for one in taken}
    times = measure(callables, rounds=ROUNDS, budget=BUDGET, seed=tokens)
    usual = default(weight, dtype, tokens, slices).name
    fastest = min(times, key=lambda name: times[name].median)
    better = times[fastest].median < (1 - MARGIN) * times[usual].median
    return Point(
        tokens=tokens,
        milliseconds={name: 1e3 * one.median for name, one in times.items()},
        spread={name: one.spread for name, one in times.items()},
        chosen=fastest if better else usual,
    )


def _call(
    formulation: Formulation,
    x: Tensor,
    copies: list[PreparedWeight],
    slices: Sequence[PreparedSlice],
    ids: Tensor | None,
) -> Callable[[int], Tensor]:
    def call(number: int) -> Tensor:
        weight = copies[number % len(copies)]
        return plan(x, weight, slices, ids, formulation=formulation)(x, ids)

    return call


def _copies(weight: PreparedWeight) -> Iterator[PreparedWeight]:
    """Yield copies of a weight that do not fit into the cache together."""
    for _ in range(copies_beyond_the_cache(weight.nbytes, weight.device.type)):
        cloned = {}
        for field in dataclasses.fields(weight):  # type: ignore[arg-type]
            value = getattr(weight, field.name)
            cloned[field.name] = (
                value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            )
        yield type(weight)(**cloned)


def _crossovers(
    points: list[Point],
    weight: PreparedWeight,
    dtype: torch.dtype,
    slices: Sequence[PreparedSlice],
) -> list[tuple[int, str]]:
    """Return (the most tokens, the formulation): each point stands for those up to it.

    Where the default was not beaten it stays, whichever formulation it is for each number of
    tokens. It also stays where the winner does not take all tokens of its range.
    """
    found: list[tuple[int, str]] = []
    first = 1
    for point in points:
        ends = (first, point.tokens)
        beaten = point.chosen != default(weight, dtype, point.tokens, slices).name
        own = beaten and all(takes(point.chosen, weight, dtype, one, slices) for one in ends)
        found.append((point.tokens, point.chosen if own else AS_USUAL))
        first = point.tokens + 1
    last = [one for one, after in itertools.pairwise(found) if one[1] != after[1]]
    return [*last, found[-1]]
