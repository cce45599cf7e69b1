"""optimum-quanto's INT4 weights with integer zero-points.

Source: ``WeightQBitsTensor.create`` of ``optimum/quanto/tensor/weights/qbits.py`` of optimum-quanto
0.2.7: groups that divide in_features, and a shift that is "either an integer representing zero
(i.e. zero-point) or a float value".
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn.functional import linear

from int4_lora.integration.conformance.peers.unsigned import (
    group_size_of,
    unsigned_codes,
    unsigned_zero_points,
)
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["QuantoQBits"]

ROWS = 0  # the axis that keeps its scales


class QuantoQBits:
    """``torch.nn.functional.linear`` with a ``WeightQBitsTensor``."""

    manifest = Manifest(
        scale_dtype_of_x=True,
        strategies=("group", "channel"),
        g_idx=False,
        base_rounded=True,
    )

    def __init__(self) -> None:
        self._quanto = importlib.import_module("optimum.quanto")

    def prepare(self, weight: PackedWeight) -> Tensor:
        """Return the tensor that quanto would use in a linear."""
        group = group_size_of(weight)
        tensor: Tensor = self._quanto.WeightQBitsTensor.create(
            self._quanto.qint4,
            ROWS,
            group,
            torch.Size(weight.shape),
            (weight.in_features, 1),
            unsigned_codes(weight).to(torch.uint8).reshape(-1, group),
            weight.scale.reshape(-1, 1),
            unsigned_zero_points(weight).to(torch.uint8).reshape(-1, 1),
        )
        return tensor

    def dequantize(self, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dequantised tensor."""
        dense: Tensor = self.prepare(weight).dequantize()
        return dense if dtype is None else dense.to(dtype)

    def int4_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product with the tensor."""
        with torch.no_grad():
            return linear(x, weight, None if bias is None else bias.to(x.dtype))
