"""Which code computes the base of a kind of layer, and which its adapters: chosen from times.

A plan says whose code computes what. Plans are compared by the times of the steps that they would
take, at the numbers of tokens that the operator favours. A plan may give some numbers of tokens to
vLLM's kernel and the others to ours only if both read one copy of the weight, in vLLM's layout.
Ours then computes many tokens, since its code for few reads layouts of its own.

Source: ``docs/vllm.md``, "Options".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean

__all__ = [
    "ADAPTERS",
    "BASES",
    "FAVOURED",
    "LAYER",
    "MANY_TOKENS",
    "MARGIN",
    "OURS",
    "SHARED_BASE",
    "STOCK_ADAPTERS",
    "TOKENS",
    "VLLM",
    "Choice",
    "Plan",
    "Times",
    "choose",
]

OURS, VLLM = "int4_lora", "vLLM"  # whose code
TOKENS = (1, 4, 8, 16, 24, 32, 64, 512)
MANY_TOKENS = 25  # from here on our code reads any layout; below, each layout has code of its own
_MANY = tuple(tokens for tokens in TOKENS if tokens >= MANY_TOKENS)
MOST_DECODED = 32  # tokens of a step that only decodes, for the option ``favour``
FAVOURED = {
    "balanced": TOKENS,
    "decode": tuple(tokens for tokens in TOKENS if tokens <= MOST_DECODED),
    "prefill": tuple(tokens for tokens in TOKENS if tokens > MOST_DECODED),
}
MARGIN = 1.05  # a plan takes the place of ours where it is faster by more, on geometric average
MOST_RATIO = 1.5  # or by more than this at a favoured number of tokens: no request may wait longer

# what is measured
OUR_BASE, VLLM_BASE = BASES = "our base", "vLLM's base"
SHARED_BASE = "our base on vLLM's layout"
LAYER = "our base and adapters"  # in one graph
ADAPTERS = "our adapters"  # added to any base
STOCK_ADAPTERS = "vLLM's adapters"

Row = Mapping[str, float]
"""The seconds of each thing that was measured at a number of tokens."""

Times = Callable[[Sequence[str], int], Row]
"""What to measure, a number of tokens -> the seconds of each; what cannot run is left out."""


@dataclass(frozen=True)
class Plan:
    """Whose code computes what in a kind of layer.

    Args:
        base: whose layout the weight has.
        ours_from: the number of tokens from which ours computes on vLLM's layout, or None for none.
        adapters: whose code adds the adapters.
    """

    base: str = OURS
    ours_from: int | None = None
    adapters: str = OURS


@dataclass(frozen=True)
class Choice:
    """The plan of a kind of layer, and why.

    Args:
        plan: the plan.
        reason: why the base is not left to ours alone, or None where it is.
        worth: how much faster the plan is than the one that it was chosen over, for the log.
    """

    plan: Plan = Plan()
    reason: str | None = None
    worth: str = ""

    def description(self, slots: int) -> str:
        """Return the plan and its worth, for the log of an engine with some slots of adapters."""
        plan, adapters = self.plan, ""
        if plan.ours_from is None:
            base = f"base by {plan.base}"
        else:
            few = plan.ours_from - 1
            base = f"base by {VLLM} up to {few} tokens and by {OURS} above, from one copy"
        if slots:
            adapters = f", adapters by {plan.adapters}"
        return f"{base}{adapters}: {self.worth}"


def choose(
    times: Times, favour: str = "balanced", *, slots: int = 0, stock_adapters: bool = False
) -> Choice:
    """Return the plan of a kind of layer.

    What cannot change the choice is not measured: ours on vLLM's layout where it would not be
    chosen if it were as fast as on its own, and adapters where ours has the better base and only
    our adapters may be taken, since they cost less in one graph with the base.

    Args:
        times: measures; ``SHARED_BASE`` is left out where no copy of the weight serves both.
        favour: a key of ``FAVOURED``.
        slots: how many adapters the engine serves at a time, 0 for none.
        stock_adapters: whether vLLM's adapters may be taken.
    """
    points = FAVOURED[favour]
    table = {tokens: dict(times(BASES, tokens)) for tokens in TOKENS}
    as_fast = {tokens: {**row, SHARED_BASE: row[OUR_BASE]} for tokens, row in table.items()}
    if _chosen(as_fast, points).plan.ours_from is not None:
        for tokens in _MANY:
            table[tokens].update(times((SHARED_BASE,), tokens))
    if slots and (stock_adapters or _chosen(table, points).plan != Plan()):
        names = (LAYER, ADAPTERS, STOCK_ADAPTERS) if stock_adapters else (LAYER, ADAPTERS)
        for tokens in TOKENS:
            table[tokens].update(times(names, tokens))
    return _chosen(table, points)


def _plans(table: Mapping[int, Row]) -> list[Plan]:
    """Return the plans whose steps were all measured, the simplest first."""
    plans = [Plan(), Plan(VLLM)]
    if all(SHARED_BASE in table[tokens] for tokens in _MANY):
        befores = [TOKENS[TOKENS.index(tokens) - 1] for tokens in _MANY]
        plans += [Plan(VLLM, ours_from=before + 1) for before in reversed(befores)]
    if all(STOCK_ADAPTERS in row for row in table.values()):
        plans += [Plan(plan.base, plan.ours_from, VLLM) for plan in plans]
    return plans


def _steps(plan: Plan, row: Row, tokens: int) -> list[float]:
    """Return the seconds of a step without adapters and, if measured, of a step with them."""
    if plan.base == OURS:
        base = row[OUR_BASE]
    elif plan.ours_from is not None and tokens >= plan.ours_from:
        base = row[SHARED_BASE]
    else:
        base = row[VLLM_BASE]
    if ADAPTERS not in row:
        return [base]
    if plan.adapters == VLLM:
        return [base, base + row[STOCK_ADAPTERS]]
    return [base, row[LAYER] if plan.base == OURS else base + row[ADAPTERS]]


def _chosen(table: Mapping[int, Row], points: Sequence[int]) -> Choice:
    """Return the choice from measured times, at the favoured numbers of tokens."""

    def ratios(plan: Plan, other: Plan, tokens: int) -> list[float]:
        """Return how many times as fast as another a plan is, in each kind of step."""
        row = table[tokens]
        both = zip(_steps(plan, row, tokens), _steps(other, row, tokens), strict=True)
        return [theirs / its for its, theirs in both]

    def speed(plan: Plan, other: Plan, among: Sequence[int]) -> float:
        return geometric_mean(ratio for tokens in among for ratio in ratios(plan, other, tokens))

    def worth(plan: Plan, other: Plan, among: Sequence[int]) -> str:
        at_ends = (f"{speed(plan, other, [at]):.2f} x at {at}" for at in (TOKENS[0], TOKENS[-1]))
        part = "adapters" if plan.base == other.base else "base"
        average = f"{speed(plan, other, among):.2f} x as fast as with {other.base}'s {part}"
        return f"{average} on average of {_range(among)} ({', '.join(at_ends)})"

    ours, *others = _plans(table)
    best, span = ours, points
    for plan in others:
        favoured = speed(plan, best, points)
        if favoured > MARGIN:
            best, span = plan, points
        elif favoured >= 1 and speed(plan, best, TOKENS) > MARGIN:
            best, span = plan, TOKENS
    if best != ours:
        faster = f"{speed(best, ours, span):.2f} x faster on average of {_range(span)}"
        return Choice(best, f"measured {faster}", worth(best, ours, span))
    fastest = max(others, key=lambda plan: speed(plan, ours, points))
    most, slow = max((max(ratios(fastest, ours, tokens)), tokens) for tokens in points)
    if most > MOST_RATIO:
        reason = f"measured {most:.2f} x faster at {slow} tokens"
        return Choice(fastest, reason, worth(fastest, ours, points))
    return Choice(worth=worth(ours, Plan(VLLM), points))


def _range(points: Sequence[int]) -> str:
    return f"{points[0]} to {points[-1]} tokens"
