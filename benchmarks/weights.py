"""Make a random weight of each format that ``benchmarks.layer`` measures.

Scales are such that a row times a normal x has a variance of about 1. In INT4 every group holds the
smallest and the largest code, so that a peer that requantises the dense weight by its minimum and
maximum, symmetric or not, gets the same sixteen levels.

Source: ``docs/format.md`` for the formats; llm-compressor's presets W4A16, W8A16, NVFP4A16 and
MXFP4A16 for the groups.
"""

import math
from dataclasses import dataclass

import torch

from int4_lora import reference

RMS_OF_CODES = {4: 4.6, 8: 73.9}  # of integers spread evenly over [-8, 7] and [-128, 127]
RMS_OF_E2M1 = 2.93
E4M3_BYTES = (0x68, 0x78)  # from 64 to 224
LARGEST_E4M3 = 224.0


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Args:
        bits: bits of a code.
        group_size: columns that share a scale unless a size is given; None for a whole row.
        is_float: whether codes are E2M1, with a fixed group size, instead of integers.
    """

    bits: int
    group_size: int | None
    is_float: bool = False


FORMATS = {
    "int4": Format(4, 128),
    "int8": Format(8, None),
    "nvfp4": Format(4, 16, is_float=True),
    "mxfp4": Format(4, 32, is_float=True),
}


def random_weight(format, rows, columns, dtype, group_size, generator):
    """Return a weight with random codes and scales.

    Args:
        format: a name in ``FORMATS``.
        rows: out_features.
        columns: in_features.
        dtype: the dtype of the scales of integers.
        group_size: columns that share a scale.
        generator: the source of randomness.
    """
    if FORMATS[format].is_float:
        return _random_float4(format, rows, columns, generator)
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


def _random_float4(format, rows, columns, generator):
    packed = torch.randint(256, (rows, columns // 2), generator=generator).to(torch.uint8)
    groups = (rows, columns // FORMATS[format].group_size)
    largest = 1 / (RMS_OF_E2M1 * columns**0.5)  # of a scale over the global scale
    if format == "mxfp4":
        power = round(math.log2(largest))
        scale = power - torch.randint(2, groups, generator=generator) + 127
        return reference.Float4Weight(packed, scale.to(torch.uint8), (rows, columns))
    bytes_of_scale = torch.randint(*E4M3_BYTES, groups, generator=generator).to(torch.uint8)
    scale, global_scale = bytes_of_scale.view(torch.float8_e4m3fn), LARGEST_E4M3 / largest
    return reference.Float4Weight(packed, scale, (rows, columns), torch.tensor([global_scale]))
