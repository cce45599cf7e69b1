"""Which known mistake a wrong result is.

A mistake is named only if it reproduces the result: every element is as near to the wrong answer
as a backend that makes this mistake comes, and the error that is left is at most half of what
there was. Where none does, pairs of mistakes are tried; where none of these does, it is
``unknown``, with the elements that are wrong.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor

from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.diagnosis.definition_steps import RIGHT, Way, read_codes
from int4_lora.reference.conformance.diagnosis.low_precision import accumulated_low
from int4_lora.reference.conformance.diagnosis.mistakes import MISTAKES, Mistake
from int4_lora.reference.conformance.diagnosis.wrong_answers import WrongAnswer, wrong_answer
from int4_lora.reference.conformance.judging.answers import answer, exact_answer
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.conformance.threads import one_thread

__all__ = ["Diagnostician", "Explanation"]

LEFT_OVER = 0.5
PAIRED_ELEMENTS = 2**17  # of the weight and of the result: beyond, only single mistakes are tried
PAIR_SEARCHES = 5
READING = ("shifts", "mask", "code")


@dataclass(frozen=True)
class Explanation:
    """Mistakes that reproduce a result.

    Args:
        names: of ``IDENTIFIERS``, in their order.
        variants: what exactly was done, one for each name.
        sure: whether they reproduce it; else they could, and count only where they explain
            another failure surely.
    """

    names: tuple[str, ...]
    variants: tuple[str, ...]
    sure: bool = True


class Diagnostician:
    """Finds the mistakes behind the failures of one backend, and learns from those it has found.

    Pairs are hundreds: after a few failures that no pair explains, only those are tried whose
    names explained an earlier one.
    """

    def __init__(self) -> None:
        self._known: set[tuple[str, ...]] = set()
        self._searches = PAIR_SEARCHES

    def explain(
        self,
        function: str,
        operands: Operands,
        result: object,
        manifest: Manifest,
        earlier_ids: Tensor | None = None,
    ) -> list[Explanation]:
        """Return every single mistake that reproduces a result, or else every pair that does.

        Args:
            function: what was called.
            operands: with what.
            result: what it returned; anything but a tensor of the right shape has no explanation.
            manifest: the roundings declared.
            earlier_ids: the adapter ids of the call before, or None.
        """
        operands = operands.to("cpu")
        exact = exact_answer(function, operands)
        if not isinstance(result, Tensor) or result.shape != exact.shape:
            return []
        got = result.detach().to("cpu")
        earlier = None if earlier_ids is None else earlier_ids.to("cpu")
        search = _Search(function, operands, got, exact, manifest, earlier)
        with one_thread():
            return self._explained(search)

    def _explained(self, search: _Search) -> list[Explanation]:
        possible = [mistake for mistake in MISTAKES if search.changes(mistake)]
        found = [_explain([mistake]) for mistake in possible if search.fits([mistake])]
        if not found and search.small:
            found = self._pairs(possible, search)
        held = (search.function, search.operands, search.got, search.manifest)
        if not found and (sure := accumulated_low(*held)) is not False:
            sums = ("sums kept in 16 bits",)
            found = [Explanation(("low_precision_accumulate",), sums, sure is True)]
        return found

    def _pairs(self, possible: Sequence[Mistake], search: _Search) -> list[Explanation]:
        pairs = [
            pair
            for pair in combinations(possible, 2)
            if pair[0].step != pair[1].step and pair[0].name != pair[1].name
        ]
        known = [pair for pair in pairs if _explain(pair).names in self._known]
        found = [_explain(pair) for pair in known if search.fits(pair)]
        if found or not self._searches:
            return found
        found = [_explain(pair) for pair in pairs if search.fits(pair)]
        self._known |= {one.names for one in found}
        self._searches -= not found
        return found


@dataclass(frozen=True, eq=False)
class _Search:
    function: str
    operands: Operands
    got: Tensor
    exact: Tensor
    manifest: Manifest
    earlier_ids: Tensor | None

    @property
    def small(self) -> bool:
        """Whether hundreds of answers can be computed in a few seconds."""
        weight = self.operands.weight
        size = 0 if weight is None else weight.in_features * weight.out_features
        return max(size, self.got.numel()) <= PAIRED_ELEMENTS

    @cached_property
    def size(self) -> Tensor:
        """What errors are measured in: the bound of each element, 1 where there is none."""
        bound = answer(self.function, self.operands, self.manifest).bound
        return torch.where(bound.isfinite() & (bound > 0), bound, 1.0)

    @cached_property
    def right(self) -> Tensor | None:
        """The answer of the right way, or None where the result is read and not computed."""
        return None if self.function == "pack" else self._answer(RIGHT).exact

    def changes(self, mistake: Mistake) -> bool:
        """Return whether a mistake makes a difference to these operands."""
        if self.right is None:
            return mistake.step in READING
        for way in _ways([mistake]):
            wrong = self._answer(way).exact
            if wrong.shape != self.right.shape or not torch.equal(
                wrong.nan_to_num(), self.right.nan_to_num()
            ):
                return True
        return False

    def _answer(self, way: Way) -> WrongAnswer:
        return wrong_answer(self.function, self.operands, way, self.manifest, self.earlier_ids)

    def fits(self, mistakes: Sequence[Mistake]) -> bool:
        """Return whether these mistakes together reproduce the result."""
        return any(self._reproduces(way) for way in _ways(mistakes))

    def _reproduces(self, way: Way) -> bool:
        if self.function == "pack":
            return self._unpacked_by(way)
        wrong = self._answer(way)
        if wrong.exact.shape != self.got.shape:
            return False
        if not wrong.exact.is_floating_point():
            return torch.equal(wrong.exact, self.got)
        return _is_near(self._written(way), wrong, self.exact.double(), self.size)

    def _unpacked_by(self, way: Way) -> bool:
        """Return whether words packed wrongly are codes again when they are read wrongly."""
        codes, dim = self.operands.codes, self.operands.dim
        if codes is None or self.got.dtype != torch.int32:
            return False
        return torch.equal(read_codes(way, self.got, codes.shape[dim], dim), codes.long())

    def _written(self, way: Way) -> Tensor:
        """Return the result as float64; what a lost tail leaves unwritten counts as zero."""
        got = self.got.double()
        if way.outputs is RIGHT.outputs:
            return got
        lost = way.outputs(torch.ones_like(got)) == 0
        return torch.where(lost & got.isnan(), 0.0, got)


def _is_near(got: Tensor, wrong: WrongAnswer, exact: Tensor, size: Tensor) -> bool:
    """Return whether a result is a wrong answer, and better explained by it than by the right."""
    finite = wrong.exact.isfinite() & got.isfinite()
    same = (got == wrong.exact) | (got.isnan() & wrong.exact.isnan())
    infinite = got.isinf() & (got.sign() == wrong.exact.sign()) & (wrong.exact.abs() > 3e4)
    error = (got - wrong.exact).abs()
    if not bool((same | infinite | (finite & (error <= wrong.tolerance))).all()):
        return False
    judged = finite & exact.isfinite()
    if not bool(judged.any()):
        return False  # nothing but NaN, which many mistakes make
    left = (error / size)[judged].square().sum()
    was = ((got - exact) / size)[judged].square().sum()
    classes = bool((exact.isfinite() != got.isfinite()).any())
    return classes or bool(left.sqrt() <= LEFT_OVER * was.sqrt() and was > 0)


def _ways(mistakes: Sequence[Mistake]) -> Iterator[Way]:
    way = RIGHT
    for mistake in mistakes:
        way = mistake.within(way)
    yield way
    if any(mistake.step in READING for mistake in mistakes):
        yield replace(way, zero_points_too=False)


def _explain(mistakes: Sequence[Mistake]) -> Explanation:
    return Explanation(
        tuple(mistake.name for mistake in mistakes),
        tuple(mistake.variant for mistake in mistakes),
    )
