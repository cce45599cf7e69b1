"""The cases as tests in a project's suite: a mixin for unittest, parameters for pytest.

Source: ``docs/conformance.md``; array-api-tests, a suite for other projects.
"""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from typing import Any, ClassVar

from parameterized import parameterized

from int4_lora.reference.conformance import Backend, Case, Outcome, run_case, select, settled

__all__ = ["BackendConformance", "check_case", "conformance_cases"]


def conformance_cases(patterns: str | None = None, *, quick: bool = False) -> Sequence[Case]:
    """Return the cases for ``pytest.mark.parametrize("case", ..., ids=lambda case: case.name)``.

    Args:
        patterns: names with ``*`` and ``?``, separated by commas; None for all.
        quick: whether to return only the cases of the quick run.
    """
    return select(patterns, quick=quick)


def check_case(backend: object, case: Case, *, device: str = "cpu", seed: int = 0) -> None:
    """Run one case: skip the test if the backend does not claim it, fail it with the diagnosis.

    Args:
        backend: the object under test, or a ``Backend``.
        case: one of ``conformance_cases()``.
        device: the device of the operands.
        seed: of the inputs.

    Raises:
        unittest.SkipTest: the backend does not claim the case; pytest skips it, too.
        AssertionError: the case failed; the message names the rule, the place and the mistake.
    """
    under_test = backend
    if not isinstance(under_test, Backend):
        under_test = Backend(backend, type(backend).__name__)
    (outcome,) = settled([run_case(under_test, case, device=device, seed=seed)])
    if outcome.status == "skipped":
        raise unittest.SkipTest(outcome.message)
    if outcome.status == "failed":
        raise AssertionError(_message(outcome))


def _message(outcome: Outcome) -> str:
    diagnosis = " + ".join(outcome.diagnosis)
    lines = [
        f"{outcome.case} ({outcome.exercises})",
        f"{outcome.rule}: {outcome.message}",
        f"where: {outcome.where}" if outcome.where else "",
        f"diagnosis: {diagnosis}",
    ]
    return "\n".join(filter(None, lines))


class BackendConformance:
    """A mixin for ``unittest.TestCase``: one test for each case.

    Set ``backend`` to the object under test, and ``device`` if it is not "cpu".

    Example:
        >>> import int4_lora.reference
        >>> class TestMyBackend(BackendConformance, unittest.TestCase):
        ...     backend = int4_lora.reference
        >>> hasattr(TestMyBackend, "test_case_000_pack_all_codes")
        True

    Source:
        ``docs/conformance.md``.
    """

    backend: ClassVar[Any] = None
    device: ClassVar[str] = "cpu"
    seed: ClassVar[int] = 0

    @parameterized.expand([(case.name, case) for case in select()])  # type: ignore[untyped-decorator]
    def test_case(self, name: str, case: Case) -> None:
        """Run one case; ``name`` is its name."""
        if self.backend is None:
            raise TypeError(f"{type(self).__name__}.backend must be the object under test")
        check_case(self.backend, case, device=self.device, seed=self.seed)
