"""Unpack the INT4 tensors of one module to a dense weight.

Source: ``docs/format.md``; the arithmetic is that of ``int4_lora.reference.dequantize``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, dequantize

__all__ = ["unpack_int4_weights"]


def unpack_int4_weights(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    g_idx: Tensor | None = None,
    *,
    shape: Sequence[int] | Tensor,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Unpack the INT4 tensors of one module: ``w = RN((q - z) * s)``, then cast to ``dtype``.

    Args:
        packed: ``weight_packed``, int32 ``[out_features, ceil(in_features / 8)]``.
        scale: ``weight_scale``, ``[1]``, ``[out_features, 1]`` or ``[out_features, groups]``,
            float16, bfloat16 or float32.
        zero_point: ``weight_zero_point``, int32 ``[ceil(out_features / 8), groups]``, packed along
            dim 0 (int8 ``[1]`` for one scale), or None for a symmetric weight.
        g_idx: ``weight_g_idx``, int32 ``[in_features]``, or None.
        shape: ``weight_shape``, ``(out_features, in_features)`` or a checkpoint's int64 tensor.
        dtype: the dtype of the result; the weight is first rounded to the scale's dtype.

    Returns:
        ``[out_features, in_features]`` in ``dtype``.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other; the message names the tensor.

    Example:
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> unpack_int4_weights(packed, torch.tensor([[2.0]]), shape=(1, 8), dtype=torch.float32)
        tensor([[-16., -14., -12., -10.,  -8.,  -6.,  -4.,  14.]])

    Source:
        ``docs/format.md``.
    """
    weight = PackedWeight(packed, scale, cast("tuple[int, int]", shape), zero_point, g_idx)
    return dequantize(weight, dtype)
