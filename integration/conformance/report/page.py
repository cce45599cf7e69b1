"""What a report shows: the values that the templates put into HTML.

Source: ``docs/commands/conform.md``, "--report".
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import int4_lora
from int4_lora.integration.conformance.report.failure import Failure, failures_of
from int4_lora.integration.conformance.report.file import OPENING
from int4_lora.integration.conformance.report.meanings import MISTAKES
from int4_lora.integration.conformance.scorecard import conforms, plain, versions
from int4_lora.reference.conformance import FUNCTIONS, REMEDIES, Manifest, Outcome

if TYPE_CHECKING:
    from int4_lora.integration.conformance.scoreboard import Row

__all__ = ["run_page", "scoreboard_page"]

MAP_BYTES = 2_100_000  # of all images; the rest of a page is smaller than a megabyte
SHOWN_OF_EACH = 4  # failures of one diagnosis, on a scoreboard
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # as cases are named
STATUSES = ("passed", "failed", "skipped")


def run_page(
    name: str,
    manifest: Manifest,
    outcomes: Sequence[Outcome],
    device: str,
    seed: int,
    *,
    left: int = 0,
) -> str:
    """Return the page of one run.

    Args:
        name: the backend's name.
        manifest: its claims.
        outcomes: settled, with their evidence.
        device: the device of the operands.
        seed: of the inputs.
        left: the number of cases that were not run after the first failure.
    """
    budget = Budget(MAP_BYTES)
    section = Section.of(name, outcomes, "c", budget, most=None)
    claims = {key: plain(value) for key, value in vars(manifest).items()}
    return _rendered(
        "run.html",
        title=f"{name}: {section.verdict}",
        section=section,
        left=left,
        claims=claims,
        defaults={key: plain(value) for key, value in vars(Manifest()).items()},
        facts=_facts(versions(), device, seed),
    )


def scoreboard_page(
    rows: Sequence[Row], known: Mapping[str, str], *, device: str, seed: int
) -> str:
    """Return the page of a scoreboard.

    Args:
        rows: one for each backend, with the evidence of their outcomes.
        known: the versions that the scoreboard depends on.
        device: the device of the operands.
        seed: of the inputs.
    """
    budget = Budget(MAP_BYTES)
    sections = [
        Section.of(row.name, row.outcomes, f"b{index}-", budget, most=SHOWN_OF_EACH, why=row.reason)
        for index, row in enumerate(rows)
    ]
    judged = [section for section in sections if section.outcomes]
    return _rendered(
        "scoreboard.html",
        title="Scoreboard: INT4 and LoRA backends against the reference",
        sections=sections,
        judged=judged,
        matrix=list(_matrix(judged)),
        facts=_facts(known, device, seed),
    )


class Budget:
    """The bytes that images may still take.

    Args:
        left: bytes.
    """

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, image: str) -> bool:
        """Take the bytes of an image if they are left."""
        fits = len(image) <= self.left
        self.left -= len(image) if fits else 0
        return fits


@dataclass(frozen=True)
class Meaning:
    """The meaning of a diagnosis.

    Args:
        mistake: what the backend does wrong, in a sentence.
        code: code that usually does it, or "".
        fix: what to do instead.
    """

    mistake: str
    code: str
    fix: str


def _meaning(name: str) -> Meaning:
    remedy = REMEDIES[name]
    return Meaning(MISTAKES[name], remedy.line, remedy.fix.replace("`", ""))


@dataclass(frozen=True)
class Fault:
    """Failures with the same diagnosis.

    Args:
        anchor: the name of its place in the page.
        names: of ``IDENTIFIERS``.
        meanings: of the names.
        variants: what exactly is done wrong, in different cases.
        shown: failures in full.
        listed: failures in one line each.
    """

    anchor: str
    names: tuple[str, ...]
    meanings: tuple[Meaning, ...]
    variants: tuple[str, ...]
    shown: list[Failure]
    listed: list[Failure]

    @property
    def count(self) -> int:
        """The number of failures."""
        return len(self.shown) + len(self.listed)

    @property
    def unknown(self) -> bool:
        """Whether no known mistake explains the failures."""
        return self.names == ("unknown",)


@dataclass(frozen=True)
class Section:
    """One backend in a page.

    Args:
        name: the backend's name.
        outcomes: settled.
        anchors: the place of each case in the page, by the case's name.
        why: why the backend could not be run, or "".
        faults: its failures by diagnosis: single mistakes first, then pairs, then the unknown.
    """

    name: str
    outcomes: Sequence[Outcome]
    anchors: Mapping[str, str]
    why: str = ""
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        name: str,
        outcomes: Sequence[Outcome],
        prefix: str,
        budget: Budget,
        *,
        most: int | None,
        why: str = "",
    ) -> Section:
        """Make a section.

        Args:
            name: the backend's name.
            outcomes: settled, with their evidence.
            prefix: of the names of its places in the page.
            budget: what images may take.
            most: the number of failures of a diagnosis that are shown in full; None for all.
            why: why the backend could not be run, or "".
        """
        anchors = {outcome.case: f"{prefix}{index}" for index, outcome in enumerate(outcomes)}
        section = cls(name, outcomes, anchors, why)
        section.faults.extend(_faults(section, prefix, budget, most))
        return section

    @property
    def verdict(self) -> str:
        """The verdict in words, or why no case was judged."""
        judged = conforms(self.outcomes)
        if judged is None:
            return self.why or "no case was judged"
        return "conforms" if judged else "does not conform"

    @property
    def state(self) -> str:
        """The status that the verdict is shown as."""
        return {True: "passed", False: "failed", None: "skipped"}[conforms(self.outcomes)]

    def count(self, status: str) -> int:
        """Return the number of cases with a status."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """The time that the cases took."""
        return sum(outcome.seconds for outcome in self.outcomes)

    @property
    def functions(self) -> list[tuple[str, dict[str, int], list[Outcome]]]:
        """Each function with the number of its cases by status, and the cases."""
        found = []
        for function in FUNCTIONS:
            cases = [each for each in self.outcomes if each.case.startswith(f"{function}/")]
            if cases:
                counts = Counter(outcome.status for outcome in cases)
                found.append((function, {status: counts[status] for status in STATUSES}, cases))
        return found

    @property
    def passed(self) -> list[Outcome]:
        """Passed cases, those nearest to their bounds first."""
        passed = [outcome for outcome in self.outcomes if outcome.status == "passed"]
        return sorted(passed, key=lambda outcome: -share_of(outcome, -1.0))

    @property
    def skipped(self) -> list[tuple[str, list[Outcome]]]:
        """Reasons for skips with their cases, the most frequent reason first."""
        reasons: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            if outcome.status == "skipped":
                reasons.setdefault(outcome.message, []).append(outcome)
        return sorted(reasons.items(), key=lambda item: -len(item[1]))

    @property
    def closest(self) -> list[tuple[str, list[float]]]:
        """The largest shares of a bound in passed cases, ascending, by the dtype of the cases."""
        by_dtype: dict[str, list[float]] = {name: [] for name in DTYPES.values()}
        for outcome in self.passed:
            dtype, share = DTYPES.get(outcome.case.split("/")[-1]), share_of(outcome, -1.0)
            if dtype is not None and share >= 0:
                by_dtype[dtype].append(share)
        return [(dtype, sorted(shares)) for dtype, shares in by_dtype.items() if shares]


def share_of(outcome: Outcome, otherwise: float) -> float:
    """Return the largest share of a bound in a case; ``otherwise`` if it has no bounds."""
    closeness = None if outcome.evidence is None else outcome.evidence.closeness
    return closeness.largest if closeness is not None and closeness.elements else otherwise


def _faults(section: Section, prefix: str, budget: Budget, most: int | None) -> Iterator[Fault]:
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in section.outcomes:
        if outcome.status == "failed":
            groups.setdefault(outcome.diagnosis, []).append(outcome)
    ordered = sorted(groups.items(), key=_order)
    for index, (names, outcomes) in enumerate(ordered):
        # a failure with a map and a short input tells most, so that it is shown first
        outcomes = sorted(outcomes, key=_telling)
        variants = Counter(" + ".join(filter(None, each.variants)) for each in outcomes)
        failures = failures_of(outcomes, section.anchors, budget.take, most)
        yield Fault(
            f"{prefix}fault{index}",
            names,
            tuple(_meaning(name) for name in names),
            tuple(variant for variant, _ in variants.most_common() if variant),
            failures if most is None else failures[:most],
            [] if most is None else failures[most:],
        )


def _order(group: tuple[tuple[str, ...], list[Outcome]]) -> tuple[bool, int, int]:
    """Return a key: single mistakes before pairs, the unknown last, more failures first."""
    names, outcomes = group
    return names == ("unknown",), len(names), -len(outcomes)


def _telling(outcome: Outcome) -> tuple[bool, int]:
    """Return a key that is small for failures that are easy to see."""
    drawn = outcome.evidence is not None and outcome.evidence.failure is not None
    return not drawn, abs(outcome.elements - 1024)


def _matrix(sections: Sequence[Section]) -> Iterator[tuple[Outcome, list[Outcome | None]]]:
    """Yield each case with its outcome for every backend."""
    by_case = [{outcome.case: outcome for outcome in each.outcomes} for each in sections]
    for outcome in sections[0].outcomes if sections else ():
        yield outcome, [outcomes.get(outcome.case) for outcomes in by_case]


def _facts(known: Mapping[str, str], device: str, seed: int) -> list[str]:
    today = datetime.date.today().isoformat()
    packages = [f"{package} {version}" for package, version in known.items()]
    return [today, f"device {device}", f"seed {seed}", *packages]


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from int4_lora.integration.conformance.report.drawing import COLOURS

    environment = Environment(
        loader=PackageLoader("int4_lora.integration.conformance.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, times=_times, sentence=_sentence)
    environment.globals.update(share_of=share_of, colours=COLOURS, version=int4_lora.__version__)
    return OPENING + environment.get_template(template).render(**values)


def _percent(value: float) -> str:
    """Return a share in percent: "0.03 %", "4.1 %", "57 %"."""
    percent = 100 * value
    digits = 2 if abs(percent) < 1 else 1 if abs(percent) < 10 else 0
    return f"{percent:.{digits}f} %"


def _times(value: float) -> str:
    """Return a number with two or three digits."""
    return f"{value:.0f}" if 100 <= value < 1e5 else f"{value:.2g}"


def _sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
