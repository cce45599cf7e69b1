"""The oracle: is a backend right, and if not, which rule does it break?

Start at ``suite.py`` for the cases, at ``judging/verdict.py`` for what is right, and at
``diagnosis/mistakes.py`` for what is known to go wrong.

Source: ``docs/conformance.md``.
"""

from int4_lora.reference.conformance.backend import Backend
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.operands import Operands, tensors_of
from int4_lora.reference.conformance.diagnosis.mistakes import IDENTIFIERS
from int4_lora.reference.conformance.diagnosis.remedies import REMEDIES
from int4_lora.reference.conformance.judging.answers import Answer, answer
from int4_lora.reference.conformance.judging.check import (
    check_addition,
    check_experts,
    check_linear,
)
from int4_lora.reference.conformance.judging.verdict import Finding, judge
from int4_lora.reference.conformance.manifest import FUNCTIONS, Manifest
from int4_lora.reference.conformance.opened import OpenedCase, case
from int4_lora.reference.conformance.procedures import ask
from int4_lora.reference.conformance.run import Outcome, run, run_case, settled
from int4_lora.reference.conformance.suite import CASES, select

__all__ = [
    "CASES",
    "FUNCTIONS",
    "IDENTIFIERS",
    "REMEDIES",
    "Answer",
    "Backend",
    "Case",
    "Finding",
    "Manifest",
    "OpenedCase",
    "Operands",
    "Outcome",
    "answer",
    "ask",
    "case",
    "check_addition",
    "check_experts",
    "check_linear",
    "judge",
    "run",
    "run_case",
    "select",
    "settled",
    "tensors_of",
]
