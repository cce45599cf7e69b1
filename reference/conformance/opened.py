"""One case opened: its operands, the exact answer and the bound, to work on a kernel.

Source: ``docs/conformance.md``, "A kernel under development".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.check import answer_on_cpu, one_thread
from int4_lora.reference.conformance.judging.verdict import Finding
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.conformance.procedures import judged
from int4_lora.reference.conformance.suite import CASES, unknown_case

__all__ = ["OpenedCase", "case"]


@dataclass(frozen=True, eq=False)
class OpenedCase:
    """The operands of a case, the truth, and how far a result may be from it.

    Args:
        case: the case.
        operands: the arguments of its call, on the device.
        truth: the exact answer, on the CPU: integers, a weight in its dtype, or float64.
        bound: float64, of the shape of ``truth``, on the CPU: the largest allowed error.
        manifest: the declared roundings.
    """

    case: Case
    operands: Operands
    truth: Tensor
    bound: Tensor
    manifest: Manifest

    def check(self, result: object) -> Finding | None:
        """Return what is wrong with a result of the case's function, or None."""
        with one_thread():
            return judged(self.case, self.operands, result, self.manifest)


def case(
    name: str, *, seed: int = 0, device: str = "cpu", manifest: Manifest | None = None
) -> OpenedCase:
    """Open one case.

    A case of several calls is opened with the operands of its first call.

    Args:
        name: its full name.
        seed: of the inputs.
        device: the device of the operands.
        manifest: the roundings that the kernel declares; None for the defaults.

    Raises:
        ValueError: no case has this name, or it is too large to be opened.

    Example:
        >>> from int4_lora.reference import int4_linear
        >>> opened = case("int4_linear/group_32_asym/bf16")
        >>> y = int4_linear(opened.operands.x, opened.operands.weight)
        >>> bool(((y.double() - opened.truth).abs() <= opened.bound).all()), opened.check(y)
        (True, None)
    """
    chosen = next((each for each in CASES if each.name == name), None)
    if chosen is None:
        raise unknown_case(name)
    if chosen.optional:
        raise ValueError(f"{name} is too large to be opened: its answer is computed in parts")
    declared = manifest or Manifest()
    operands = chosen.operands(seed).to(device)
    held = answer_on_cpu(chosen.function, operands, declared)
    return OpenedCase(chosen, operands, held.exact, held.bound, declared)
