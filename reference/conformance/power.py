"""The power of the suite: the smallest planted error that it still finds, for each diagnosis.

An error is planted in the exact answer of a case, which is then rounded once, as by a backend that
is right but for this error. It starts with one wrong weight or result and grows until a case
finds it. Errors of a continuous size (a scaling, an offset of every result) grow by factors of two.

Source: ``docs/conformance.md``, "How small a mistake is found"; mutation testing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance.backend import Backend
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.diagnosis.definition_steps import (
    RIGHT,
    Way,
    answer_of,
    dense_weight,
)
from int4_lora.reference.conformance.diagnosis.expert_mistakes import (
    EXPERT_MISTAKES,
    ExpertMistake,
    answer_with,
)
from int4_lora.reference.conformance.diagnosis.mistakes import IDENTIFIERS, MISTAKES, Mistake
from int4_lora.reference.conformance.judging.answers import Answer, answer
from int4_lora.reference.conformance.judging.check import one_thread
from int4_lora.reference.conformance.judging.verdict import judge, rms_rule
from int4_lora.reference.conformance.judging.yardstick import one_by_one, yardstick_rms
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.conformance.procedures import ask

__all__ = ["PLANTED", "Planted", "Power", "Question", "measure"]

OF_WEIGHTS = ("shifts", "mask", "code", "zero_points", "centre", "group", "product", "columns")
COUNTS = (1, 4, 16, 64, 256)  # wrong weights or results
SHARES = tuple(2.0**power for power in range(-24, 3))
X_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PRODUCTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Question:
    """A case with its exact answer, which errors are planted in.

    Args:
        case: of the procedure "answer" or "many_draws".
        seed: of the inputs.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed = case, seed
        self.operands: Operands = case.operands(seed)
        self.held: Answer = answer(case.function, self.operands, Manifest())

    @cached_property
    def rms(self) -> float | None:
        """The yardstick's rms error."""
        return yardstick_rms(self.case.function, self.operands, Manifest(), self.held)

    @cached_property
    def earlier_ids(self) -> Tensor | None:
        """Other ids, as of an earlier call."""
        ids = self.operands.adapter_ids
        return None if ids is None else ids.roll(1)

    def of_way(self, way: Way) -> Tensor:
        """Return the answer of a backend that computes in a way."""
        return answer_of(self.case.function, self.operands, way, Manifest(), self.earlier_ids).exact

    def rule(self, result: Tensor) -> str:
        """Return the rule that a result breaks once it has the right dtype, or ""."""
        written, equal = result.to(self.held.dtype), self.case.equal
        finding = judge(written, self.held, equal=equal, yardstick=None)
        if finding is None and not equal:
            finding = rms_rule(written, self.held, self.rms)
        return "" if finding is None else finding.rule


@dataclass(frozen=True)
class Planted:
    """An error of growing size.

    Args:
        diagnosis: one of ``IDENTIFIERS``.
        sizes: from the smallest to the largest.
        rule: (question, size) -> the rule that finds the error; "" for none, None where the error
            changes nothing.
        words: (question, size) -> the error in words.
    """

    diagnosis: str
    sizes: Sequence[float]
    rule: Callable[[Question, float], str | None]
    words: Callable[[Question, float], str]


@dataclass(frozen=True)
class Power:
    """The smallest error of a kind that is found.

    Args:
        diagnosis: one of ``IDENTIFIERS``.
        error: the error in words; "" if none is found.
        found: the number of cases that find an error of this size.
        changed: the number of cases whose answers it changes.
        case: one of those that find it, the largest.
        rule: the rule that the case's result breaks.
    """

    diagnosis: str
    error: str
    found: int
    changed: int
    case: str
    rule: str


def measure(
    cases: Sequence[Case], planted: Sequence[Planted] | None = None, *, seed: int = 0
) -> Iterator[Power]:
    """Yield the smallest error that is found of each kind.

    Args:
        cases: what ``select`` returned; of those that make several calls, only those of systematic
            errors are used.
        planted: the errors; None for ``PLANTED``.
        seed: of the inputs.
    """
    wide = [case for case in cases if not case.name.endswith("fp64") and not case.optional]
    with one_thread():
        questions = [
            Question(case, seed) for case in wide if case.procedure in ("answer", "many_draws")
        ]
        for each in PLANTED if planted is None else planted:
            yield _smallest(each, questions)


def _smallest(planted: Planted, questions: Sequence[Question]) -> Power:
    changed = 0
    for size in planted.sizes:
        rules = [(question, planted.rule(question, size)) for question in questions]
        changed = sum(rule is not None for _, rule in rules)
        found = [(question, rule) for question, rule in rules if rule]
        if found:
            largest, rule = max(found, key=lambda pair: _extent(pair[0]))
            words = planted.words(largest, size)
            name = largest.case.name
            return Power(planted.diagnosis, words, len(found), changed, name, rule)
    return Power(planted.diagnosis, "", 0, changed, "", "")


def _extent(question: Question) -> int:
    weight = question.operands.packed_weight
    return question.held.exact.numel() if weight is None else weight.packed.numel() * 8


def _of_mistake(mistake: Mistake) -> Planted:
    """Make a mistake in some weights, or in some results, of medium effect."""
    way = mistake.within(RIGHT)

    def rule(question: Question, count: float) -> str | None:
        weight, function = question.operands.packed_weight, question.case.function
        if question.case.procedure != "answer" or function in ("pack", "int4_moe"):
            return None
        if mistake.step in OF_WEIGHTS and weight is not None:
            right, wrong = dense_weight(RIGHT, weight), dense_weight(way, weight)
            chosen = _medium(right, wrong, int(count), finite=True)
            return None if chosen is None else question.rule(_with(question, right, wrong, chosen))
        right, wrong = question.of_way(RIGHT), question.of_way(way)
        chosen = _medium(right, wrong, int(count), finite=False)
        if chosen is None:
            return None
        return question.rule(torch.where(chosen, wrong, question.held.exact.to(wrong.dtype)))

    def words(question: Question, count: float) -> str:
        weight = question.operands.packed_weight
        if mistake.step in OF_WEIGHTS and weight is not None:
            return f"{int(count)} of {weight.in_features * weight.out_features:,} weights"
        return f"{int(count)} of {question.held.exact.numel():,} results"

    return Planted(mistake.name, COUNTS, rule, words)


def _of_expert_mistake(mistake: ExpertMistake) -> Planted:
    """Make a mistake of experts in some results, of medium effect."""

    def rule(question: Question, count: float) -> str | None:
        if question.case.procedure != "answer" or question.case.function != "int4_moe":
            return None
        wrong = answer_with(mistake, question.operands, Manifest(), question.earlier_ids)
        if wrong is None:
            return None
        exact = question.held.exact
        chosen = _medium(exact, wrong.exact, int(count), finite=False)
        return None if chosen is None else question.rule(torch.where(chosen, wrong.exact, exact))

    return Planted(
        mistake.name,
        COUNTS,
        rule,
        lambda question, count: f"{int(count)} of {question.held.exact.numel():,} results",
    )


def _medium(right: Tensor, wrong: Tensor, count: int, *, finite: bool) -> Tensor | None:
    """Return a mask of the ``count`` differences of medium size, or None if there are too few."""
    if right.shape != wrong.shape or not right.numel():
        return None
    difference = (wrong.double() - right.double()).abs()
    difference = torch.where(right == wrong, 0.0, difference)  # of infinities
    both = right.double().isnan() & wrong.double().isnan()
    usable = difference.isfinite() if finite else ~both
    difference = torch.where(usable, difference.nan_to_num(nan=torch.inf), 0.0).flatten()
    changed = difference.nonzero().flatten()
    if len(changed) < count:
        return None
    order = changed[difference[changed].argsort(stable=True)]
    first = (len(order) - count) // 2
    chosen = torch.zeros(right.numel(), dtype=torch.bool)
    chosen[order[first : first + count]] = True
    return chosen.reshape(right.shape)


def _with(question: Question, right: Tensor, wrong: Tensor, chosen: Tensor) -> Tensor:
    """Return the exact answer with some weights wrong."""
    x, exact = question.operands.x, question.held.exact
    if x is None:
        if question.operands.dtype is not None:
            wrong = wrong.to(question.operands.dtype)
        return torch.where(chosen, wrong.to(exact.dtype), exact)
    rows = chosen.any(dim=1).nonzero().flatten()
    change = torch.where(chosen, wrong - right, 0.0)[rows].nan_to_num()
    used = change.any(dim=0)  # so that a NaN in another column's x changes nothing
    exact = exact.clone()
    exact[:, rows] += x.double()[:, used] @ change[:, used].T
    return exact


def _scale_of_a_group(question: Question, units: float) -> str | None:
    """Move one scale of a weight by some units in the last place."""
    weight = question.operands.packed_weight
    if weight is None or question.case.procedure != "answer":
        return None
    moved = _moved_scale(weight, int(units))
    right, wrong = dense_weight(RIGHT, weight), dense_weight(RIGHT, moved)
    chosen = (right != wrong) & right.isfinite() & wrong.isfinite()
    return question.rule(_with(question, right, wrong, chosen)) if bool(chosen.any()) else None


def _moved_scale(weight: PackedWeight, units: int) -> PackedWeight:
    scale = weight.scale.clone(memory_format=torch.contiguous_format)
    bits = scale.view(torch.int32 if scale.element_size() == 4 else torch.int16).view(-1)
    bits[-1] += units
    return dataclasses.replace(weight, scale=scale)


def _scaling(question: Question, share: float) -> str | None:
    """Multiply every scaling by 1 + share; exact cases show what float32 cannot hold."""
    case = question.case
    if case.procedure != "answer" or case.equal or not question.operands.slices:
        return None
    right = question.of_way(RIGHT)
    wrong = question.of_way(dataclasses.replace(RIGHT, scaling=lambda s: s * (1 + share)))
    changed = (right != wrong) & right.isfinite()
    if not bool(changed.any()):
        return None
    return question.rule(torch.where(changed, wrong, question.held.exact))


def _last_products(question: Question, count: float) -> str | None:
    """Sum the last products of each result in float16."""
    x, weight, last = question.operands.x, question.operands.weight, int(count)
    if question.case.procedure != "answer" or x is None or weight is None:
        return None
    dense = dense_weight(RIGHT, weight)[:, -last:]
    low = one_by_one(x[:, -last:].half(), dense.half()).double()
    changed = low - x[:, -last:].double() @ dense.T
    if not changed.numel() or not bool(changed.isfinite().all()):
        return None
    return question.rule(question.held.exact + changed)


def _one_result(short: str) -> Planted:
    """Move one result by a share of its bound, away from zero."""

    def rule(question: Question, share: float) -> str | None:
        exact, bound = question.held.exact.double().clone(), question.held.bound
        movable = (bound > 0) & bound.isfinite() & exact.isfinite()
        case = question.case
        if case.procedure != "answer" or case.equal or not case.name.endswith(short):
            return None
        if case.function == "int4_moe":  # its bound is that of three sums
            return None
        if not bool(movable.any()):
            return None
        at = tuple(movable.nonzero()[int(movable.sum()) // 2].tolist())
        exact[at] += (-1.0 if bool(exact[at] < 0) else 1.0) * share * bound[at]
        return question.rule(exact)

    return Planted(
        "unknown",
        SHARES,
        rule,
        lambda question, share: f"one {X_DTYPES[short]} result off by {_in_bounds(share)}",
    )


def _every_result(short: str) -> Planted:
    """Move every result by a share of its bound, where the bound still holds after rounding."""

    def rule(question: Question, share: float) -> str | None:
        if question.case.procedure != "many_draws" or not question.case.name.endswith(short):
            return None
        asked = ask(question.case, Backend(_Moved(share), "moved"), question.seed, "cpu")
        return next((each.finding.rule for each in asked if each.finding is not None), "")

    return Planted(
        "unknown",
        SHARES[16:],
        rule,
        lambda question, share: f"every {X_DTYPES[short]} result off by {_in_bounds(share)}",
    )


class _Moved:
    """A backend whose results are moved by a share of their bounds."""

    def __init__(self, share: float) -> None:
        self.share = share

    def int4_lora_linear(self, *arguments: Any) -> Tensor:
        """Return the exact layer, moved and rounded."""
        names = ("x", "weight", "lora", "adapter_ids", "bias")
        operands = Operands(**dict(zip(names, arguments, strict=False)))
        held = answer("int4_lora_linear", operands, Manifest())
        bound = held.bound.nan_to_num(posinf=0.0)
        moved = (held.exact + self.share * bound).to(held.dtype)
        within = (moved.double() - held.exact).abs() <= bound
        return torch.where(within, moved, held.exact.to(held.dtype))


def _in_bounds(share: float) -> str:
    return f"{share:g} of its bound" if share >= 1 else f"1/{1 / share:,.0f} of its bound"


def _first_of_each_name() -> list[Planted]:
    names: dict[str, Planted] = {}
    for mistake in MISTAKES:
        names.setdefault(mistake.name, _of_mistake(mistake))
    for of_experts in EXPERT_MISTAKES:
        names.setdefault(of_experts.name, _of_expert_mistake(of_experts))
    return list(names.values())


PLANTED: tuple[Planted, ...] = tuple(
    sorted(
        (
            *_first_of_each_name(),
            Planted(
                "scale_rounded",
                (1, 2, 4, 8),
                _scale_of_a_group,
                lambda question, units: f"one scale {units:g} unit in the last place off",
            ),
            Planted(
                "scaling_missing",
                SHARES,
                _scaling,
                lambda question, share: f"every scaling 1/{1 / share:,.0f} too large",
            ),
            Planted(
                "low_precision_accumulate",
                PRODUCTS,
                _last_products,
                lambda question, count: (
                    f"the last {count:g} of {question.operands.activations.shape[1]:,} products "
                    "summed in float16"
                ),
            ),
            *(_one_result(short) for short in X_DTYPES),
            *(_every_result(short) for short in X_DTYPES),
        ),
        key=lambda planted: IDENTIFIERS.index(planted.diagnosis),
    )
)
"""The errors, in the order of ``IDENTIFIERS``: the first variant of each mistake, and others."""
