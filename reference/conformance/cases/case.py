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
"""How a case is asked: a key of ``procedures.PROCEDURES``."""


@dataclass(frozen=True)
class Case:
    """One question to a backend.

    Args:
        name: ``function/what/dtype``; the numbers are drawn from it and the seed.
        exercises: a sentence, what a backend that passes has shown.
        function: which function is called.
        make: returns the operands, from the draws of this case.
        procedure: how it is asked: "answer" is one call, held against the exact answer.
        quick: whether it belongs to the quick run, and to the small set of golden files.
        equal: whether the exact answer is demanded, without any rounding error.
        optional: whether it runs only when it is named.

    Example:
        >>> from int4_lora.reference.conformance.suite import CASES
        >>> case = next(one for one in CASES if one.name == "unpack/all_codes")
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
        """Return the operands, on the CPU; the same for the same seed on every machine."""
        return self.make(Draws(seed, self.name))
