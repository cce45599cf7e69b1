"""A case: one question to a backend, as data.

Source: TOSA's conformance tests, whose cases are generators with bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.operands import Operands

__all__ = ["Case", "Procedure"]

Procedure = str
"""The way a case is asked: a key of ``procedures.PROCEDURES``."""


@dataclass(frozen=True)
class Case:
    """One question to a backend.

    Args:
        name: ``function/what/dtype``; the random numbers depend on it and on the seed.
        exercises: what a backend that passes has shown, in words.
        function: the function that is called.
        make: makes the operands from the draws of this case.
        procedure: the way it is asked: "answer" is one call, held against the exact answer.
        quick: whether it belongs to the quick run and to the small set of golden files.
        equal: whether the result must be the exact answer, without any rounding error.
        optional: whether it runs only when it is named in full.

    Example:
        >>> from int4_lora.reference.conformance.suite import CASES
        >>> case = next(case for case in CASES if case.name == "unpack/all_codes")
        >>> case.operands().packed.dtype
        torch.int32
    """

    name: str
    exercises: str
    function: str
    make: Callable[[Draws], Operands]
    procedure: Procedure = "answer"
    quick: bool = False
    equal: bool = False
    optional: bool = False

    def operands(self, seed: int = 0) -> Operands:
        """Make the operands, on the CPU: the same for a seed on every machine."""
        return self.make(Draws(seed, self.name))
