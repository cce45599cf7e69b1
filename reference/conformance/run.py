"""Run cases against a backend, and settle on the mistakes behind the failures.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from int4_lora.reference.conformance.backend import Backend, Modified
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.diagnosis.mistakes import IDENTIFIERS
from int4_lora.reference.conformance.diagnosis.search import Diagnostician, Explanation
from int4_lora.reference.conformance.evidence import Evidence, Witness
from int4_lora.reference.conformance.judging.check import one_thread
from int4_lora.reference.conformance.judging.verdict import Finding
from int4_lora.reference.conformance.procedures import Asked, ask, called, judged
from int4_lora.reference.conformance.reproduce import affected, described, smallest, snippet

__all__ = ["Outcome", "failed", "run", "run_case", "settled"]

UNDECLARED: tuple[dict[str, Any], ...] = (
    {"weight_rounded": False},
    {"base_rounded": True},
    {"weight_rounded": False, "base_rounded": True},
    {"base_rounded": True, "delta_rounded": True},
    {"weight_rounded": False, "base_rounded": True, "delta_rounded": True},
    {"steps_rounded": False, "weight_rounded": False},
    {"steps_rounded": True},
    {"steps_rounded": True, "weight_rounded": False},
)
STATISTICAL = "low_precision_accumulate"  # the only mistake that is not reproduced exactly
RANK = (*(name for name in IDENTIFIERS if name != STATISTICAL), STATISTICAL)
UNKNOWN = Explanation(("unknown",), ("",))
UNEXPLAINED = ("form", "memory", "systematic_error", "repeat", "kept")  # told by the message
NOT_DETERMINISTIC = "declared not deterministic"
MOST_CHARACTERS = 500  # of an exception's text


@dataclass(frozen=True)
class Outcome:
    """The outcome of one case.

    Args:
        case: the name of the case.
        exercises: what it exercises.
        status: "passed", "failed" or "skipped".
        rule: the rule that a failure broke, else "".
        message: why it failed or was skipped; "" if it passed.
        where: the elements that are wrong, in words.
        explanations: every mistake that reproduces the failure.
        diagnosis: names of ``IDENTIFIERS``; empty unless it failed.
        variants: what exactly is done wrong, for each name of the diagnosis.
        snippet: Python that reproduces the failure.
        smallest: the smallest input on which the case still fails, in words.
        elements: the size of the result, by which the smallest failure is found.
        seconds: the time it took.
        evidence: how close results came, and the call that failed; None unless it is asked for.
    """

    case: str
    exercises: str
    status: str
    rule: str = ""
    message: str = ""
    where: str = ""
    explanations: tuple[Explanation, ...] = ()
    diagnosis: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    snippet: str = ""
    smallest: str = ""
    elements: int = 0
    seconds: float = 0.0
    evidence: Evidence | None = None


def run(
    backend: Backend,
    cases: Sequence[Case],
    *,
    seed: int = 0,
    device: str = "cpu",
    evidence: bool = False,
) -> Iterator[Outcome]:
    """Run cases one after the other; yield the outcome of each, not yet settled.

    Args:
        backend: the object under test.
        cases: what ``select`` returned.
        seed: of the inputs.
        device: the device of the operands.
        evidence: whether outcomes keep their evidence.

    Example:
        >>> import int4_lora.reference
        >>> from int4_lora.reference.conformance import Backend, select
        >>> backend = Backend(int4_lora.reference, "reference")
        >>> [outcome.status for outcome in run(backend, select("pack/ragged"))]
        ['passed']
    """
    diagnostician = Diagnostician()
    for case in cases:
        start = time.perf_counter()
        outcome = run_case(
            backend, case, diagnostician, seed=seed, device=device, evidence=evidence
        )
        yield replace(outcome, seconds=time.perf_counter() - start)


def run_case(
    backend: Backend,
    case: Case,
    diagnostician: Diagnostician | None = None,
    *,
    seed: int = 0,
    device: str = "cpu",
    evidence: bool = False,
) -> Outcome:
    """Run one case and return its outcome.

    Args:
        backend: the object under test.
        case: the case.
        diagnostician: names the mistakes, and is kept from case to case; None for a new one.
        seed: of the inputs.
        device: the device of the operands.
        evidence: whether the outcome keeps its evidence; not that of an optional case.
    """
    diagnostician = diagnostician or Diagnostician()
    operands = case.operands(seed)
    why = backend.skips(case.function, operands, device)
    if why is None and case.procedure == "repeat" and not backend.manifest.deterministic:
        why = NOT_DETERMINISTIC
    if why is not None:
        return Outcome(case.name, case.exercises, "skipped", message=why)
    witness = Witness(case.function) if evidence and not case.optional else None
    try:
        for asked in ask(case, backend, seed, device):
            if witness is not None:
                witness.see(asked)
            if asked.finding is not None:
                outcome = _failed(backend, case, asked, diagnostician, (seed, device))
                return _with_evidence(outcome, witness)
    except Modified as error:
        return _raised(backend, case, error.finding(), (seed, device))
    except KeyboardInterrupt:  # of the user
        raise
    except BaseException as error:
        finding = Finding("call", f"raised {type(error).__name__}: {_said(error)}")
        outcome = _raised(backend, case, finding, (seed, device))
        return replace(outcome, explanations=_of_ids_out_of_range(backend, operands))
    return _with_evidence(Outcome(case.name, case.exercises, "passed"), witness)


def _said(error: BaseException) -> str:
    """Return what an exception says: a line of at most 500 characters that can be printed."""
    try:
        text = str(error)
    except Exception as another:
        return f"(its text raises {type(another).__name__})"
    line = " ".join(text[:MOST_CHARACTERS].split())
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return "".join(escaped) + ("..." if len(text) > MOST_CHARACTERS else "")


def _with_evidence(outcome: Outcome, witness: Witness | None) -> Outcome:
    return outcome if witness is None else replace(outcome, evidence=witness.evidence())


def settled(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Give each failure a diagnosis: of the mistakes that reproduce it, the most frequent one.

    Several mistakes may reproduce a failure, since not every case tells them apart.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    variants: Counter[tuple[str, ...]] = Counter()
    for outcome in outcomes:
        sure = [explanation for explanation in outcome.explanations if explanation.sure]
        counts.update({explanation.names for explanation in sure})
        variants.update({explanation.variants for explanation in sure})

    def order(explanation: Explanation) -> tuple[int, int, tuple[int, ...], int]:
        names = explanation.names
        ranks = tuple(RANK.index(name) for name in names)
        return (-counts[names], len(names), ranks, -variants[explanation.variants])

    diagnosed = []
    for outcome in outcomes:
        if outcome.status == "failed":
            possible = [each for each in outcome.explanations if counts[each.names]]
            best = min(possible, key=order, default=UNKNOWN)
            outcome = replace(outcome, diagnosis=best.names, variants=best.variants)
        diagnosed.append(outcome)
    return diagnosed


def _raised(backend: Backend, case: Case, finding: Finding, where: tuple[int, str]) -> Outcome:
    text = snippet(backend.name, case, where, ([], 0, 0), 0)
    return Outcome(case.name, case.exercises, "failed", finding.rule, finding.message, snippet=text)


def _of_ids_out_of_range(backend: Backend, operands: Operands) -> tuple[Explanation, ...]:
    """Return the explanation that ids of an earlier case do not fit this case's adapters, or none.

    It is not sure: it counts where earlier ids surely explain another failure.
    """
    for part in operands.slices[:1]:
        if any(bool((ids >= part.stack.adapters).any()) for ids in backend.past_ids(operands)):
            variants = ("those of an earlier call, which has more adapters",)
            return (Explanation(("stale_adapter_ids",), variants, sure=False),)
    return ()


def failed(case: Case, asked: Asked, diagnostician: Diagnostician) -> Outcome:
    """Return the outcome of a call with a finding, with every mistake that reproduces it."""
    finding = asked.finding or Finding("", "")
    explanations: list[Explanation] = []
    if finding.rule not in UNEXPLAINED and not case.optional:
        explanations = diagnostician.explain(
            case.function,
            asked.operands,
            asked.result,
            asked.manifest,
            asked.earlier_ids,
            asked.past_ids,
        )
        explanations += undeclared(case, asked)
    return Outcome(
        case.name,
        case.exercises,
        "failed",
        finding.rule,
        finding.message,
        affected(case.function, asked.operands, finding.wrong),
        tuple(explanations),
        elements=0 if finding.wrong is None else finding.wrong.numel(),
    )


def undeclared(case: Case, asked: Asked) -> list[Explanation]:
    """Return the roundings that would make a result correct if they were declared.

    An undeclared rounding is no mistake, so its name is "unknown"; it becomes the diagnosis where
    it explains more failures than any mistake.
    """
    if case.equal or case.function in ("pack", "unpack"):
        return []
    explanations: list[Explanation] = []
    of_experts = case.function == "int4_moe"
    for flags in UNDECLARED:
        manifest = replace(asked.manifest, **flags)
        if manifest == asked.manifest or ("steps_rounded" in flags) != of_experts:
            continue
        with one_thread():
            finding = judged(case, asked.operands, asked.result, manifest)
        if finding is None:
            claims = ", ".join(f"{name}={value}" for name, value in flags.items())
            variant = f"right if the manifest says {claims}"
            explanations.append(Explanation(("unknown",), (variant,)))
    return explanations


def _failed(
    backend: Backend,
    case: Case,
    asked: Asked,
    diagnostician: Diagnostician,
    where: tuple[int, str],
) -> Outcome:
    def fails(operands: Operands) -> bool:
        if backend.manifest.why_not(operands) is not None:
            return False
        try:
            again = called(case, backend, operands).finding
        except KeyboardInterrupt:  # of the user
            raise
        except BaseException:  # not the failure that is to be reproduced
            return False
        return again is not None and asked.finding is not None and again.rule == asked.finding.rule

    whole: tuple[list[int], int, int] = ([], 0, 0)
    part = smallest(asked, fails) if case.procedure == "answer" else whole
    weight = asked.operands.weight
    outputs = 0 if weight is None else weight.out_features
    text = snippet(backend.name, case, where, part, outputs)
    described_part = described(asked.operands, part)
    return replace(failed(case, asked, diagnostician), snippet=text, smallest=described_part)
