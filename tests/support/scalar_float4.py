"""A second opinion on FP4: one element at a time, written from docs/format.md alone.

Codes and scales are decoded from their fields, not looked up, and the exact quotient is rounded to
bfloat16 with whole numbers. It shares no code and no trick with the reference.
"""

import math
from fractions import Fraction

import numpy as np


def e2m1(code):
    """Return the value of a code: sign, 2 bits of exponent with bias 1, 1 bit of mantissa."""
    sign = -1.0 if code & 8 else 1.0
    exponent, mantissa = code >> 1 & 3, code & 1
    if exponent == 0:
        return sign * mantissa * 0.5
    return sign * (1 + mantissa / 2) * 2.0 ** (exponent - 1)


def e4m3(byte):
    """Return the value of an E4M3 byte: bias 7, no infinity, NaN where all other bits are set."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e8m0(byte):
    """Return the value of an E8M0 byte."""
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def to_bfloat16(exact):
    """Round a fraction once to bfloat16, ties to even; returns the 16 bits."""
    sign = 0x8000 if exact < 0 else 0
    size = abs(exact)
    if size == 0:
        return sign
    exponent = math.floor(math.log2(size.numerator) - math.log2(size.denominator))
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    step = Fraction(2) ** (max(exponent, -126) - 7)  # between neighbours; 2^-133 of subnormals
    steps = round(size / step)  # of Fraction: exact, half to even
    if steps * step >= Fraction(2) ** 128:
        return sign | 0x7F80
    value = float(steps * step)  # at most 8 bits: exact
    return sign | int(np.float32(value).view(np.uint32)) >> 16


def weight_bits(code, scale, global_scale):
    """Return the bfloat16 bits of code * scale / global_scale; None for NaN."""
    value = code * scale
    if math.isfinite(value) and math.isfinite(global_scale) and value and global_scale:
        return to_bfloat16(Fraction(value) / Fraction(global_scale))
    with np.errstate(divide="ignore", invalid="ignore"):
        special = np.float64(value) / np.float64(global_scale)
    if np.isnan(special):
        return None
    sign = 0x8000 if np.signbit(special) else 0
    return sign | (0x7F80 if np.isinf(special) else 0)
