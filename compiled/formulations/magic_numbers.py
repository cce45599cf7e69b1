"""Turn nibbles into float32 without a conversion: assemble the bits of 1 + q/16 and 1 + q/256.

A float32 in [1, 2) has the exponent bits of 1.0 and a mantissa of 23 bits. A nibble in the first
four bits of the mantissa makes 1 + q/16, in the next four 1 + q/256. One shift moves two
neighbouring nibbles there at once; a mask and an OR with the exponent, one instruction on a GPU,
make each of them a number. The kernel then computes ``c (1 + q/c) - (c + z) = q - z`` with c = 16
or 256.

The exponent is a tensor, not a constant: with two constants that instruction becomes two.

Source: FasterTransformer's ``interleaved_numeric_conversion`` uses bit tricks of this kind for
float16; the constants follow from IEEE 754.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled.layouts.interleaved import EXPONENT_OF_ONE

__all__ = ["CODE_SCALES", "EXPONENT_OF_ONE", "ORDER", "decoded", "decoded_rows"]

LEFT_SHIFTS = (15, 7, -1, -9)  # each moves two nibbles, the lower one first, to bits 15 to 22
MASKS = (0x078000, 0x780000)
CODE_SCALES = (256.0, 16.0) * len(LEFT_SHIFTS)  # c of each nibble
ORDER = (7, 5, 3, 1, 6, 4, 2, 0)  # sorted by c: this order of use needs the fewest registers


def decoded(words: Tensor, exponent: Tensor) -> list[Tensor]:
    """Return ``1 + q/c`` in float32 for each of a word's eight nibbles, the lowest first.

    Args:
        words: int32 of any shape.
        exponent: int32 that broadcasts to ``words``, filled with ``EXPONENT_OF_ONE``.

    Example:
        >>> one = torch.tensor(EXPONENT_OF_ONE, dtype=torch.int32)
        >>> fractions = decoded(torch.tensor(0x00000073, dtype=torch.int32), one)
        >>> [float((f - 1) * c) for f, c in zip(fractions, CODE_SCALES)][:3]
        [3.0, 7.0, 0.0]
    """
    found = []
    for left in LEFT_SHIFTS:
        moved = words << left if left > 0 else words >> -left
        found += [((moved & mask) | exponent).view(torch.float32) for mask in MASKS]
    return found


def decoded_rows(packed: Tensor, rows: int, exponent: Tensor) -> Tensor:
    """Return ``1 + n/256`` in float32 for nibbles n packed along rows.

    Args:
        packed: int16 ``[at least ceil(rows / 4), groups]``, four rows in each number, such as the
            zero-points of ``InterleavedWeight``.
        rows: the number of packed rows.
        exponent: int32 that broadcasts to ``[rows, groups]``, filled with ``EXPONENT_OF_ONE``.

    Returns:
        ``[rows, groups]``.

    Example:
        >>> one = torch.tensor(EXPONENT_OF_ONE, dtype=torch.int32)
        >>> rows = decoded_rows(torch.tensor([[0x0073]], dtype=torch.int16), 2, one)
        >>> (rows.flatten() - 1) * 256
        tensor([3., 7.])
    """
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=packed.device).unsqueeze(1)
    nibbles = (packed.to(torch.int32).unsqueeze(1) >> shifts).flatten(0, 1)[:rows] & 15
    return ((nibbles << LEFT_SHIFTS[0]) | exponent).view(torch.float32)
