"""torchao's INT4 weights on a CPU.

torchao stores w = (u - 8) s + o, with scales and offsets in one dtype.

Source: the docstring of ``torchao.prototype.quantization.int4.Int4OpaqueTensor`` of torchao 0.18:
x in float16, bfloat16 or float32, groups of 32, 64 or 128.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.nn.functional import linear

from int4_lora.integration.conformance.peers.unsigned import (
    group_size_of,
    int8_zero_points,
    unsigned_codes,
)
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["TorchaoInt4"]

INNER_TILES = 1  # the operator for CPUs ignores it


class TorchaoInt4:
    """``torch.nn.functional.linear`` with an ``Int4OpaqueTensor``."""

    manifest = Manifest(
        scale_dtype_of_x=True,
        groups=(32, 64, 128),
        strategies=("group",),
        g_idx=False,
        finite_scales=True,
        out_multiple=16,
        devices=("cpu",),
        weight_rounded=False,
        base_rounded=True,
    )

    def __init__(self) -> None:
        self._int4 = importlib.import_module("torchao.prototype.quantization.int4")
        self._utils = importlib.import_module("torchao.quantization.utils")

    def prepare(self, weight: PackedWeight) -> Tensor:
        """Return the weight as ``Int4OpaqueTensor.from_hp`` would lay it out."""
        offset = -int8_zero_points(weight).to(weight.scale.dtype) * weight.scale
        table = self._utils.pack_tinygemm_scales_and_zeros(weight.scale, offset, weight.scale.dtype)
        data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            unsigned_codes(weight), INNER_TILES
        )
        group = [1, group_size_of(weight)]
        tensor: Tensor = self._int4.Int4OpaqueTensor(data, table, group, torch.Size(weight.shape))
        return tensor

    def int4_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the product with the tensor."""
        return linear(x, weight, bias)
