"""A failure in short: the elements it is about, and Python that reproduces it.

Source: ``docs/conformance.md``; array-api-tests, whose failures print code that reproduces them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.operands import Operands, tensors_of
from int4_lora.reference.conformance.judging.answers import WEIGHTS
from int4_lora.reference.conformance.procedures import Asked
from int4_lora.reference.dequantization import scale_columns

__all__ = ["affected", "described", "ranges", "smallest", "snippet"]

SHOWN = 6  # runs of numbers
DIMENSIONS = {
    "pack": ("rows", "words"),
    "unpack": ("rows", "columns"),
    **dict.fromkeys(WEIGHTS, ("outputs", "columns")),
    "shrink": ("tokens", "ranks"),
}
TRIED = 4  # tokens, each alone
STEP = 8  # outputs: zero-points are packed by eight


def affected(function: str, operands: Operands, wrong: Tensor | None) -> str:
    """Return where a result is wrong, in words: "tokens 3 of 16, outputs all of 64".

    Args:
        function: the function that was called.
        operands: its arguments.
        wrong: bool, of the result's shape; None where the finding is about no element.
    """
    if wrong is None or wrong.ndim != 2:
        return ""
    rows, columns = (wrong.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    names = DIMENSIONS.get(function, ("tokens", "outputs"))
    parts = [
        f"{name} {ranges(indices, length)}"
        for name, indices, length in zip(names, (rows, columns), wrong.shape, strict=True)
    ]
    weight = operands.packed_weight
    if function in WEIGHTS and weight is not None and weight.scale.shape[-1] > 1:
        groups = sorted(set(scale_columns(weight)[columns].tolist()))
        parts.append(f"groups {ranges(groups, weight.scale.shape[-1])}")
    return ", ".join(parts)


def ranges(numbers: list[int], length: int) -> str:
    """Return ascending numbers of ``range(length)`` in short.

    Example:
        >>> ranges([0, 1, 2, 7], 16)
        '0-2, 7 of 16'
        >>> ranges([0, 1], 2)
        'all of 2'
    """
    if len(numbers) == length:
        return f"all of {length}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{low}" if low == high else f"{low}-{high}" for low, high in runs[:SHOWN]]
    return f"{', '.join(shown)}{' ...' if len(runs) > SHOWN else ''} of {length}"


def smallest(asked: Asked, fails: Callable[[Operands], bool]) -> tuple[list[int], int, int]:
    """Return (tokens, start, stop): one token and eight outputs if they still fail, or all.

    Args:
        asked: a call with a finding.
        fails: whether the backend fails on given operands.
    """
    operands, wrong = asked.operands, asked.finding.wrong if asked.finding else None
    x, weight = operands.x, operands.weight
    if x is None or (weight is None and operands.experts is None):
        return [], 0, 0
    tokens, start, stop = list(range(x.shape[0])), 0, 0 if weight is None else weight.out_features
    if wrong is None or not bool(wrong.any()):
        return tokens, start, stop
    output = int(wrong.nonzero()[0][1])
    for token in wrong.any(dim=1).nonzero().flatten().tolist()[:TRIED]:
        if fails(operands.with_tokens(torch.tensor([token]))):
            tokens = [token]
            operands = operands.with_tokens(torch.tensor(tokens))
            break
    in_blocks = isinstance(weight, PackedWeight) and weight.strategy == "block"
    if weight is not None and not in_blocks:
        low = output // STEP * STEP
        high = min(low + STEP, stop)
        if fails(operands.with_outputs(low, high)):
            start, stop = low, high
    return tokens, start, stop


def described(operands: Operands, part: tuple[list[int], int, int]) -> str:
    """Return the part of a call that ``smallest`` returned, in words, with its tensors.

    Args:
        operands: the arguments of the whole call.
        part: what ``smallest`` returned.
    """
    tokens, start, stop = part
    words = []
    if len(tokens) == 1:
        operands = operands.with_tokens(torch.tensor(tokens))
        words.append(f"token {tokens[0]}")
    if operands.weight is not None and stop - start not in (0, operands.weight.out_features):
        operands = operands.with_outputs(start, stop)
        words.append(f"outputs {start} to {stop - 1}")
    where = ", ".join(words) or "the whole call"
    shapes = (
        f"{name} {[*tensor.shape]} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors_of(operands).items()
    )
    return f"{where}: {', '.join(shapes)}"


def snippet(
    name: str, case: Case, where: tuple[int, str], part: tuple[list[int], int, int], outputs: int
) -> str:
    """Return Python that reproduces a failure.

    Args:
        name: the backend, as ``load_backend`` takes it.
        case: the case. Unless its procedure is "answer", it is run whole.
        where: the seed and the device.
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
