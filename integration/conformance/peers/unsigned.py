"""A weight as peers store it: codes and zero-points from 0 to 15, one row of scales per output.

compressed-tensors stores signed numbers; most other formats add 8 to codes and zero-points.

Source: ``docs/format.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, unpack

__all__ = ["group_size_of", "int8_zero_points", "nibbles", "unsigned_codes", "unsigned_zero_points"]

OFFSET = 8


def unsigned_codes(weight: PackedWeight) -> Tensor:
    """Return the codes plus 8, int32 ``[out, in]``."""
    return unpack(weight.packed, weight.in_features).to(torch.int32) + OFFSET


def int8_zero_points(weight: PackedWeight) -> Tensor:
    """Return the signed zero-points, int8 ``[out, groups]``; 0 for a symmetric weight.

    Args:
        weight: of the strategy "channel" or "group".
    """
    if weight.zero_point is None:
        return torch.zeros(weight.out_features, weight.scale.shape[1], dtype=torch.int8)
    return unpack(weight.zero_point, weight.out_features, dim=0)


def unsigned_zero_points(weight: PackedWeight) -> Tensor:
    """Return the zero-points plus 8, int32 ``[out, groups]``."""
    return int8_zero_points(weight).to(torch.int32) + OFFSET


def group_size_of(weight: PackedWeight) -> int:
    """Return the number of columns that share a scale."""
    return weight.in_features // weight.scale.shape[1]


def nibbles(values: Tensor) -> Tensor:
    """Pack numbers from 0 to 15 along the last dimension, two a byte, the low nibble first.

    Args:
        values: int32 ``[..., n]``; an odd n is padded with a zero.
    """
    padded = torch.nn.functional.pad(values, (0, values.shape[-1] % 2))
    return (padded[..., 0::2] | padded[..., 1::2] << 4).to(torch.uint8)
