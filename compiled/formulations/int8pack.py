"""Few tokens on a CPU: one call of torch's INT8 operator, opaque to the compiler.

base = RN_x( sum of (q * s) * x ),   y = RN_x( base + delta + bias )

The operator never rounds q * s to the scale's dtype, and rounds its result to x's dtype. So the
base is rounded before an adapter or a bias is added: ``weight_rounded=False, base_rounded=True``.

It has fast code for bfloat16 only: with float16 and float32 it takes 4 to 30 times as long as a
dense product. Its loads are aligned and read 16 columns and 4 scales at a time: a row that is no
multiple of 16, or an x that does not start at a multiple of 32 bytes, ends the process. So x is
copied into a buffer that torch aligns.

Source: ``aten/src/ATen/native/cpu/int8mm_kernel.cpp`` of PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.int8 import Int8Weight

__all__ = ["INT8PACK", "base"]

COLUMNS, ROWS = 16, 4  # read at a time
LARGEST = 2**31  # codes, which the operator counts in 32 bits


def base(x: Tensor, weight: Int8Weight) -> Tensor:
    """Return ``x W^T``, rounded to the dtype of x."""
    scale = weight.scale.reshape(weight.out_features)
    product: Tensor = torch.ops.aten._weight_int8pack_mm(_aligned(x), weight.codes, scale)
    return product


def _aligned(x: Tensor) -> Tensor:
    """Return a copy of x at the start of its own memory.

    It has a row more than x while it is made: Inductor leaves out a plain clone.
    """
    return torch.nn.functional.pad(x, (0, 0, 0, 1))[: x.shape[0]]


def _limit(weight: Int8Weight, dtype: torch.dtype, tokens: int) -> str | None:
    if dtype != torch.bfloat16 or weight.scale_dtype != torch.bfloat16:
        return f"x in {dtype} with scales in {weight.scale_dtype}: both must be bfloat16"
    if weight.groups != 1 or weight.zero_point is not None:
        return "groups of columns" if weight.groups != 1 else "zero-points"
    rows, columns = weight.shape
    if columns % COLUMNS or rows % ROWS:
        return f"a weight of {rows} x {columns}, no multiples of {ROWS} x {COLUMNS}"
    if rows * columns >= LARGEST:
        return "2^31 codes or more"
    return None


INT8PACK = Formulation(
    name="int8pack",
    base=base,
    layout=Int8Weight,
    weight_rounded=False,
    base_rounded=True,
    limit=_limit,
    devices=("cpu",),
    one_call=True,
)
