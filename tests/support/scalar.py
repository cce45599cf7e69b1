"""A second opinion on the bits: NumPy, one element at a time, written from docs/format.md alone.

It shares no code and no vectorised trick with the reference.
"""

import numpy as np
import torch


def unpack_row(words, width, bits):
    """Return the signed codes of one row of int32 words."""
    codes = []
    for position in range(width):
        word = int(words[position * bits // 32]) % 2**32  # as an unsigned number
        stored = word // 2 ** (position * bits % 32) % 2**bits
        codes.append(stored - 2 ** (bits - 1))
    return codes


def round_to(value, dtype):
    """Round a Python float once to a float dtype, half to even; returns a float64."""
    if dtype == torch.float32:
        return float(np.float32(value))
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return float(np.float16(value))
    if not np.isfinite(value) or value == 0:
        return value
    word = int(np.float32(value).view(np.uint32))  # exact for (q - z) * s of a bfloat16 scale
    kept, lost = word >> 16, word & 0xFFFF
    if lost > 0x8000 or (lost == 0x8000 and kept & 1):
        kept += 1
    return float(np.uint32(kept << 16).view(np.float32))


def dequantize(weight):
    """Return the dense weight as a float64 array, each value rounded once to the scale's dtype."""
    rows, columns = weight.shape
    scale = weight.scale.to(torch.float64).numpy()
    g_idx = None if weight.g_idx is None else weight.g_idx.tolist()
    if g_idx is not None and -1 in g_idx:
        g_idx = None
    dense = np.empty((rows, columns))
    for i in range(rows):
        codes = unpack_row(weight.packed[i].tolist(), columns, weight.bits)
        for j in range(columns):
            where = place(weight, scale.shape, g_idx, i, j)
            zero_point = zero_point_of(weight, where, i)
            dense[i, j] = round_to(
                float((codes[j] - zero_point) * scale[where]), weight.scale.dtype
            )
    return dense


def place(weight, table, g_idx, i, j):
    """Return where the scale of weight (i, j) stands in the scale table."""
    if len(table) == 1:
        return (0,)
    if isinstance(weight.group_size, tuple):
        return i // weight.group_size[0], j // weight.group_size[1]
    if g_idx is not None:
        return i, g_idx[j]
    return i, j * table[1] // weight.shape[1]


def zero_point_of(weight, where, i):
    """Return the zero-point of the scale at ``where``, for output i."""
    if weight.zero_point is None:
        return 0
    if weight.zero_point.dtype == torch.int8:
        return int(weight.zero_point[where])
    column = weight.zero_point[:, where[1]].tolist()
    return unpack_row(column, weight.shape[0], weight.bits)[i]
