"""Make a random weight of each format that ``benchmarks.layer`` measures.

Scales are such that a row times a normal x has a variance of about 1. In INT4 every group holds the
smallest and the largest code, so that a peer that requantises the dense weight by its minimum and
maximum, symmetric or not, gets the same sixteen levels.

Source: ``docs/format.md`` for the formats; llm-compressor's presets W4A16 and W8A16 for the groups.
"""

from dataclasses import dataclass

import torch

from int4_lora import reference

RMS_OF_CODES = {4: 4.6, 8: 73.9}  # of integers spread evenly over [-8, 7] and [-128, 127]


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Args:
        bits: bits of a code.
        group_size: columns that share a scale unless a size is given; None for a whole row.
    """

    bits: int
    group_size: int | None


FORMATS = {"int4": Format(4, 128), "int8": Format(8, None)}


def random_weight(format, rows, columns, dtype, group_size, generator):
    """Return a weight with random codes and scales.

    Args:
        format: a name in ``FORMATS``.
        rows: out_features.
        columns: in_features.
        dtype: the dtype of the scales.
        group_size: columns that share a scale.
        generator: the source of randomness.
    """
    bits = FORMATS[format].bits
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (rows, columns), generator=generator, dtype=torch.int8)
    codes[:, ::group_size] = low
    codes[:, 1::group_size] = high
    scale = torch.rand(rows, columns // group_size, generator=generator) + 0.5
    return reference.PackedWeight(
        packed=reference.pack(codes, bits=bits),
        scale=(scale / (RMS_OF_CODES[bits] * columns**0.5)).to(dtype),
        shape=(rows, columns),
        group_size=group_size,
        bits=bits,
    )
