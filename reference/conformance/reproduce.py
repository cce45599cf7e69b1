"""The smallest failing input, as Python that can be pasted.

Source: array-api-tests, whose failures print what reproduces them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.procedures import Asked

__all__ = ["smallest", "snippet"]

TRIED = 4  # tokens, each alone
STEP = 8  # outputs: zero-points are packed by eight


def smallest(asked: Asked, fails: Callable[[Operands], bool]) -> tuple[list[int], int, int]:
    """Return (tokens, first output, last output) of a small part that fails, or of all.

    Args:
        asked: a call with a finding.
        fails: whether the backend fails on operands.
    """
    operands, wrong = asked.operands, asked.finding.wrong if asked.finding else None
    x, weight = operands.x, operands.weight
    if x is None or weight is None:
        return [], 0, 0
    tokens, start, stop = list(range(x.shape[0])), 0, weight.out_features
    if wrong is None or not bool(wrong.any()):
        return tokens, start, stop
    output = int(wrong.nonzero()[0][1])
    for token in wrong.any(dim=1).nonzero().flatten().tolist()[:TRIED]:
        if fails(operands.with_tokens(torch.tensor([token]))):
            tokens = [token]
            operands = operands.with_tokens(torch.tensor(tokens))
            break
    if weight.strategy in ("channel", "group") and not operands.slices[1:]:
        low = output // STEP * STEP
        high = min(low + STEP, stop)
        if fails(operands.with_outputs(low, high)):
            start, stop = low, high
    return tokens, start, stop


def snippet(
    name: str, case: Case, where: tuple[int, str], part: tuple[list[int], int, int], outputs: int
) -> str:
    """Return Python that shows a failure again.

    Args:
        name: the backend, as ``load_backend`` takes it.
        case: the case; all procedures but "answer" are shown whole.
        where: the seed, and the device.
        part: what ``smallest`` returned.
        outputs: out_features of the whole case.
    """
    (seed, device), (tokens, start, stop) = where, part
    cut = f".with_tokens(torch.tensor({tokens}))" if len(tokens) == 1 else ""
    cut += f".with_outputs({start}, {stop})" if stop - start not in (0, outputs) else ""
    used = "answer" if case.procedure == "answer" else "ask"
    lines = [
        *(["import torch"] if "torch." in cut else []),
        "from int4_lora.integration.conformance import load_backend",
        f"from int4_lora.reference.conformance import {used}, select",
        f"backend = load_backend({name!r})",
        f"(case,) = select({case.name!r})",
    ]
    if case.procedure != "answer":
        lines.append(f"for asked in ask(case, backend, {seed}, {device!r}):")
        lines.append("    print(asked.finding)")
        return "\n".join(lines)
    lines += [
        f"operands = case.operands({seed}){cut}" + ("" if device == "cpu" else f".to({device!r})"),
        "prepared = backend.prepare(operands)",
        "result = backend.call(case.function, operands, prepared)",
        "held = answer(case.function, operands, backend.declared(operands, prepared))",
        "print(result, held.exact, held.bound, sep='\\n')",
    ]
    return "\n".join(lines)
