"""MLX's quantised product on a CPU; zero-points become its table of biases.

MLX computes w = u s + b, with scales and biases in the dtype of x; here b = -(z + 8) s.

Source: ``mlx.core.quantize`` and ``mlx.core.quantized_matmul`` of MLX 0.32, mode "affine": groups
of 32, 64 or 128, out_features that are a multiple of 32.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.conformance.peers.unsigned import group_size_of, unsigned_zero_points
from int4_lora.reference import PackedWeight
from int4_lora.reference.conformance import Manifest

__all__ = ["MlxQuantized"]


class MlxQuantized:
    """``mlx.core.quantized_matmul``."""

    manifest = Manifest(
        scale_dtype_of_x=True,
        groups=(32, 64, 128),
        strategies=("group",),
        g_idx=False,
        finite_scales=True,
        in_multiple=32,
        out_multiple=32,
        weight_rounded=False,
        base_rounded=True,
    )

    def __init__(self) -> None:
        self._mlx = importlib.import_module("mlx.core")

    def prepare(self, weight: PackedWeight) -> tuple[Any, Any, Any, int]:
        """Return words, scales, biases and the group size."""
        biases = -unsigned_zero_points(weight).to(weight.scale.dtype) * weight.scale
        words = self._mlx.array(weight.packed.numpy()).view(self._mlx.uint32)
        return words, self._array(weight.scale), self._array(biases), group_size_of(weight)

    def int4_linear(
        self, x: Tensor, weight: tuple[Any, Any, Any, int], bias: Tensor | None = None
    ) -> Tensor:
        """Return the product."""
        words, scales, biases, group = weight
        y = self._mlx.quantized_matmul(
            self._array(x), words, scales, biases, transpose=True, group_size=group, bits=4
        )
        if bias is not None:
            y = y + self._array(bias.to(x.dtype))
        return self._tensor(y)

    def _array(self, value: Tensor) -> Any:
        if value.dtype == torch.bfloat16:  # numpy has no bfloat16
            return self._mlx.array(value.contiguous().view(torch.int16).numpy()).view(
                self._mlx.bfloat16
            )
        return self._mlx.array(value.contiguous().numpy())

    def _tensor(self, value: Any) -> Tensor:
        import numpy

        if value.dtype == self._mlx.bfloat16:
            words = numpy.array(value.view(self._mlx.int16))
            return torch.from_numpy(words).view(torch.bfloat16)
        return torch.from_numpy(numpy.array(value))
