"""torch's INT4 operator for CPUs; zero-points become its table of offsets.

The operator computes w = (u - 8) s + o with scales and offsets in the dtype of x.

Source: ``aten/src/ATen/native/cpu/int4mm_kernel.cpp`` of PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, unpack
from int4_lora.reference.conformance import Manifest

__all__ = ["TorchInt4Pack"]

INNER_TILES = 1  # the operator for CPUs ignores it


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as the operator wants it.

    Args:
        data: uint8.
        table: ``[groups, out_features, 2]``: scales and offsets.
        group_size: columns that share a scale.
    """

    data: Tensor
    table: Tensor
    group_size: int


class TorchInt4Pack:
    """``aten::_weight_int4pack_mm_for_cpu``."""

    manifest = Manifest(
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        scale_dtype_of_x=True,
        groups=(32, 64, 128, 256),
        strategies=("group",),
        g_idx=False,
        finite_scales=True,
        out_multiple=16,
        in_multiple=32,
        bias=False,
        devices=("cpu",),
        weight_rounded=False,
    )

    def __init__(self) -> None:
        if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
            raise ImportError("this torch has no _weight_int4pack_mm_for_cpu")

    def prepare(self, weight: PackedWeight) -> Packed:
        """Convert a weight to the operator's layout; the offset is -z s in the scale's dtype."""
        codes = unpack(weight.packed, weight.in_features).to(torch.int32) + 8
        scale = weight.scale.T  # [groups, out]
        offset = torch.zeros_like(scale)
        if weight.zero_point is not None:
            table = unpack(weight.zero_point, weight.out_features, dim=0)
            offset = -table.T.to(scale.dtype) * scale
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)
        group = weight.in_features // weight.scale.shape[1]
        return Packed(data, torch.stack([scale, offset], dim=2).contiguous(), group)

    def int4_linear(self, x: Tensor, weight: Packed) -> Tensor:
        """Return the operator's result."""
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), weight.data, weight.group_size, weight.table
        )
        return y
