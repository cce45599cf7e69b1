"""The oracle: cases, bounds and diagnosis that a backend is held against.

Start at ``suite.py`` for the cases, at ``verdict.py`` for what is right, and at ``mistakes.py`` for
what is known to go wrong. It needs torch and the standard library only.

Source: ``docs/conformance.md``.
"""

from int4_lora.reference.conformance.backend import Backend
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.operands import Operands, tensors_of
from int4_lora.reference.conformance.diagnosis.mistakes import IDENTIFIERS
from int4_lora.reference.conformance.judging.answers import Answer, answer
from int4_lora.reference.conformance.judging.check import check_addition, check_linear
from int4_lora.reference.conformance.judging.verdict import Finding, judge
from int4_lora.reference.conformance.manifest import FUNCTIONS, Manifest
from int4_lora.reference.conformance.procedures import ask
from int4_lora.reference.conformance.run import Outcome, run, run_case, settled
from int4_lora.reference.conformance.suite import CASES, select

__all__ = [
    "CASES",
    "FUNCTIONS",
    "IDENTIFIERS",
    "Answer",
    "Backend",
    "Case",
    "Finding",
    "Manifest",
    "Operands",
    "Outcome",
    "answer",
    "ask",
    "check_addition",
    "check_linear",
    "judge",
    "run",
    "run_case",
    "select",
    "settled",
    "tensors_of",
]
