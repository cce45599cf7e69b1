"""torch's CPU operator for the base, few tokens: one opaque call.

base = RN_x( sum over groups of s * sum of (q * x) ),   y = RN_x( base + delta + bias )

The operator never rounds (q - z) * s and rounds its result to x's dtype, so with an adapter or a
bias the base is rounded first: ``weight_rounded=False, base_rounded=True``.

Source: ``aten/src/ATen/native/cpu/int4mm_kernel.cpp`` of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.layouts.layout import PreparedWeight

__all__ = ["INT4PACK", "base"]


def base(x: Tensor, weight: Int4PackWeight) -> Tensor:
    """Return ``x W^T``, rounded to the dtype of x."""
    size = weight.columns_of_a_scale
    operator = torch.ops.aten._weight_int4pack_mm_for_cpu
    product: Tensor = operator(x.contiguous(), weight.data, size, weight.table)
    return product


def _layer(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    assert isinstance(weight, Int4PackWeight)
    product = base(x, weight)
    if not slices and bias is None:
        return product
    return add_terms(product, x, slices, adapter_ids, bias)


def _refuses(weight: PreparedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    if not isinstance(weight, Int4PackWeight):
        return "a layout other than the operator's"
    if dtype != weight.table.dtype:
        return f"x in {dtype} with scales in {weight.table.dtype}"
    return None


INT4PACK = Formulation(
    name="int4pack",
    layer=_layer,
    weight_rounded=False,
    base_rounded=True,
    refuses=_refuses,
    devices=("cpu",),
    one_call=True,
)
