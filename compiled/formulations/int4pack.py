"""Few tokens on a CPU: one call of torch's INT4 operator, opaque to the compiler.

base = RN_x( sum over groups of s * sum of (q * x) ),   y = RN_x( base + delta + bias )

The operator never rounds (q - z) * s, and rounds its result to x's dtype. So the base is rounded
before an adapter or a bias is added: ``weight_rounded=False, base_rounded=True``.

Source: ``aten/src/ATen/native/cpu/int4mm_kernel.cpp`` of PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.int4pack import Int4PackWeight

__all__ = ["INT4PACK", "base"]


def base(x: Tensor, weight: Int4PackWeight) -> Tensor:
    """Return ``x W^T``, rounded to the dtype of x."""
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    product: Tensor = operator(x.contiguous(), weight.data, weight.columns_of_a_scale, weight.table)
    return product


def _limit(weight: Int4PackWeight, dtype: torch.dtype, tokens: int) -> str | None:
    if dtype != weight.scale_dtype:
        return f"x in {dtype} with scales in {weight.scale_dtype}"
    return None


INT4PACK = Formulation(
    name="int4pack",
    base=base,
    layout=Int4PackWeight,
    weight_rounded=False,
    base_rounded=True,
    limit=_limit,
    devices=("cpu",),
    one_call=True,
)
