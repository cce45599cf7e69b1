"""Which tokens, outputs, columns or groups a finding is about, in a few words.

Source: ``docs/conformance.md``.
"""

from __future__ import annotations

from torch import Tensor

from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.dequantization import scale_columns

__all__ = ["affected", "ranges"]

SHOWN = 6
DIMENSIONS = {
    "pack": ("rows", "words"),
    "unpack": ("rows", "columns"),
    "dequantize": ("outputs", "columns"),
    "shrink": ("tokens", "ranks"),
}


def affected(function: str, operands: Operands, wrong: Tensor | None) -> str:
    """Return where a result is wrong: "tokens 3 of 16, outputs all of 64".

    Args:
        function: what was called.
        operands: with what.
        wrong: bool, the shape of the result, or None if no element is singled out.
    """
    if wrong is None or wrong.ndim != 2:
        return ""
    rows, columns = (wrong.any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    names = DIMENSIONS.get(function, ("tokens", "outputs"))
    found = [
        f"{name} {ranges(where, length)}"
        for name, where, length in zip(names, (rows, columns), wrong.shape, strict=True)
    ]
    weight = operands.weight
    if function == "dequantize" and weight is not None and weight.scale.shape[-1] > 1:
        groups = sorted({int(one) for one in scale_columns(weight)[columns]})
        found.append(f"groups {ranges(groups, weight.scale.shape[-1])}")
    return ", ".join(found)


def ranges(numbers: list[int], length: int) -> str:
    """Return numbers in short.

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
