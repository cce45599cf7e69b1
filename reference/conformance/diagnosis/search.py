"""The search for the known mistake that explains a wrong result.

A mistake is named only if it reproduces the result: every element is as near to the mistake's
answer as a backend that makes it would come, and at most half of the error is left. Where no
mistake does, pairs are tried; where no pair does, the diagnosis is ``unknown``.

The mistake ``stale_adapter_ids`` is also tried with the ids of earlier cases, since a graph may
keep those of any call with as many tokens.

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
from int4_lora.reference.conformance.diagnosis.definition_steps import (
    RIGHT,
    AnswerOfWay,
    Way,
    answer_of,
    read_codes,
)
from int4_lora.reference.conformance.diagnosis.expert_mistakes import (
    EXPERT_MISTAKES,
    answer_with,
)
from int4_lora.reference.conformance.diagnosis.low_precision import accumulated_low
from int4_lora.reference.conformance.diagnosis.mistakes import MISTAKES, Mistake
from int4_lora.reference.conformance.judging.answers import answer, exact_answer
from int4_lora.reference.conformance.judging.check import one_thread
from int4_lora.reference.conformance.manifest import Manifest

__all__ = ["Diagnostician", "Explanation"]

LEFT_OVER = 0.5  # of the error
PAIRED_ELEMENTS = 2**17  # for larger weights and results only single mistakes are tried
PAIR_SEARCHES = 5
READING = ("shifts", "mask", "code")
(STALE,) = (mistake for mistake in MISTAKES if mistake.name == "stale_adapter_ids")


@dataclass(frozen=True)
class Explanation:
    """Mistakes that reproduce a result.

    Args:
        names: of ``IDENTIFIERS``, in their order.
        variants: what exactly was done, for each name.
        sure: whether they reproduce it. If not, they are possible, and count only where they
            surely explain another failure.
    """

    names: tuple[str, ...]
    variants: tuple[str, ...]
    sure: bool = True


class Diagnostician:
    """Finds the mistakes behind the failures of one backend, and remembers those it found.

    There are hundreds of pairs: after a few failures that no pair explains, it tries only pairs
    whose names explained an earlier failure.
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
        past_ids: Sequence[Tensor] = (),
    ) -> list[Explanation]:
        """Return every mistake that reproduces a result; if there is none, every pair that does.

        Args:
            function: the function that was called.
            operands: its arguments.
            result: what it returned. Only a tensor of the right shape can be explained.
            manifest: the declared roundings.
            earlier_ids: the adapter ids of the case's previous call, or None.
            past_ids: the different adapter ids of earlier calls with as many tokens.
        """
        operands = operands.to("cpu")
        exact = exact_answer(function, operands)
        if not isinstance(result, Tensor) or result.shape != exact.shape:
            return []
        got = result.detach().to("cpu")
        earlier = None if earlier_ids is None else earlier_ids.to("cpu")
        search = _Search(function, operands, got, exact, manifest, earlier)
        with one_thread():
            return self._explained(search, [ids.to("cpu") for ids in past_ids])

    def _explained(self, search: _Search, past_ids: Sequence[Tensor]) -> list[Explanation]:
        if search.function == "int4_moe":
            return _of_experts(search)
        possible = [mistake for mistake in MISTAKES if search.changes(mistake)]
        explanations = [
            _explain([mistake], sure=search.sure) for mistake in possible if search.fits([mistake])
        ]
        explanations += _of_past_ids(search, past_ids)
        if not explanations and search.small:
            explanations = self._pairs(possible, search)
        if explanations:
            return explanations
        call = (search.function, search.operands, search.got, search.manifest)
        reproduced = accumulated_low(*call)
        if reproduced is False:
            return []
        variants = ("sums kept in 16 bits",)
        return [Explanation(("low_precision_accumulate",), variants, sure=reproduced is True)]

    def _pairs(self, possible: Sequence[Mistake], search: _Search) -> list[Explanation]:
        pairs = [
            pair
            for pair in combinations(possible, 2)
            if pair[0].step != pair[1].step and pair[0].name != pair[1].name
        ]
        known = [pair for pair in pairs if _explain(pair).names in self._known]
        explanations = [_explain(pair, sure=search.sure) for pair in known if search.fits(pair)]
        if explanations or not self._searches:
            return explanations
        explanations = [_explain(pair, sure=search.sure) for pair in pairs if search.fits(pair)]
        self._known |= {explanation.names for explanation in explanations}
        if not explanations:
            self._searches -= 1
        return explanations


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
        """Whether hundreds of answers are a matter of seconds."""
        weight = self.operands.weight
        size = 0 if weight is None else weight.in_features * weight.out_features
        return max(size, self.got.numel()) <= PAIRED_ELEMENTS

    @property
    def sure(self) -> bool:
        """Whether a mistake that gives this result is the only one: if all is NaN, many do."""
        return not self.got.is_floating_point() or not bool(self.got.isnan().all())

    @cached_property
    def size(self) -> Tensor:
        """The unit of each error: the bound of the element, 1 where it has none."""
        bound = answer(self.function, self.operands, self.manifest).bound
        return torch.where(bound.isfinite() & (bound > 0), bound, 1.0)

    @cached_property
    def right(self) -> Tensor | None:
        """The answer of ``RIGHT``, or None for ``pack``, whose result is read and not computed."""
        return None if self.function == "pack" else self._answer(RIGHT).exact

    def changes(self, mistake: Mistake) -> bool:
        """Return whether a mistake changes the answer for these operands."""
        if self.right is None:
            return mistake.step in READING
        for way in _ways([mistake]):
            wrong = self._answer(way).exact
            if wrong.shape != self.right.shape or not _same(wrong, self.right):
                return True
        return False

    def differ_where_wrong(self, ids: Tensor) -> bool:
        """Return whether the tokens that these ids would change are those that are wrong."""
        if self.operands.adapter_ids is None or self.right is None or self.got.numel() == 0:
            return False
        adapters = self.operands.slices[0].stack.adapters
        changed = _in_range(ids, adapters) != _in_range(self.operands.adapter_ids, adapters)
        right = self._answer(RIGHT)
        near = (self.got.double() - right.exact).abs() <= right.tolerance
        wrong = ~(near | (self.got == right.exact) | (self.got.isnan() & right.exact.isnan()))
        tokens, unclear = wrong.any(dim=1), ~self.got.isfinite().any(dim=1)
        return bool(torch.equal(tokens & changed, tokens) and (tokens | unclear)[changed].all())

    def _answer(self, way: Way) -> AnswerOfWay:
        return answer_of(self.function, self.operands, way, self.manifest, self.earlier_ids)

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
        """Return whether wrongly packed words give the codes when they are read by ``way``."""
        codes, dim = self.operands.codes, self.operands.dim
        if codes is None or self.got.dtype != torch.int32:
            return False
        return torch.equal(read_codes(way, self.got, codes.shape[dim], dim), codes.long())

    def _written(self, way: Way) -> Tensor:
        """Return the result in float64, with zeros where a lost tail leaves it unwritten."""
        got = self.got.double()
        if way.outputs is RIGHT.outputs:
            return got
        lost = way.outputs(torch.ones_like(got)) == 0
        return torch.where(lost & got.isnan(), 0.0, got)


def _is_near(got: Tensor, wrong: AnswerOfWay, exact: Tensor, size: Tensor) -> bool:
    """Return whether a result is near a wrong answer, and nearer to it than to the exact one."""
    finite = wrong.exact.isfinite() & got.isfinite()
    same = (got == wrong.exact) | (got.isnan() & wrong.exact.isnan())
    infinite = got.isinf() & (got.sign() == wrong.exact.sign()) & (wrong.exact.abs() > 3e4)
    error = (got - wrong.exact).abs()
    if not bool((same | infinite | (finite & (error <= wrong.tolerance))).all()):
        return False
    judged = finite & exact.isfinite()
    if not bool(judged.any()):
        return bool(got.isnan().all()) and bool(exact.isfinite().any())
    left = (error / size)[judged].square().sum()
    before = ((got - exact) / size)[judged].square().sum()
    classes_differ = bool((exact.isfinite() != got.isfinite()).any())
    return classes_differ or bool(left.sqrt() <= LEFT_OVER * before.sqrt() and before > 0)


def _of_experts(search: _Search) -> list[Explanation]:
    """Return the mistakes of experts that reproduce a result."""
    exact, explanations = search.exact.double(), []
    for mistake in EXPERT_MISTAKES:
        wrong = answer_with(mistake, search.operands, search.manifest, search.earlier_ids)
        if wrong is None or _same(wrong.exact, exact):
            continue
        if _is_near(search.got.double(), wrong, exact, search.size):
            explanations.append(Explanation((mistake.name,), (mistake.variant,), search.sure))
    return explanations


def _of_past_ids(search: _Search, past_ids: Sequence[Tensor]) -> list[Explanation]:
    """Return the explanation by the ids of an earlier call, of another case perhaps.

    Ids that are all equal are not sure: a backend that leaves out its adapters gives what ids that
    are all -1 give.
    """
    for ids in past_ids:
        again = replace(search, earlier_ids=ids)
        if again.differ_where_wrong(ids) and again.fits([STALE]):
            sure = search.sure and bool((ids != ids[0]).any())
            variants = ("those of an earlier call with as many tokens",)
            return [Explanation((STALE.name,), variants, sure=sure)]
    return []


def _in_range(ids: Tensor, adapters: int) -> Tensor:
    """Return the ids, with -1 for those that no adapter has."""
    return torch.where(ids < adapters, ids.clamp(min=-1), -1)


def _same(first: Tensor, second: Tensor) -> bool:
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _ways(mistakes: Sequence[Mistake]) -> Iterator[Way]:
    way = RIGHT
    for mistake in mistakes:
        way = mistake.within(way)
    yield way
    if any(mistake.step in READING for mistake in mistakes):
        yield replace(way, zero_points_too=False)


def _explain(mistakes: Sequence[Mistake], *, sure: bool = True) -> Explanation:
    return Explanation(
        tuple(mistake.name for mistake in mistakes),
        tuple(mistake.variant for mistake in mistakes),
        sure,
    )
