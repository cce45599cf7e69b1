"""The reference's own forward, unmodified, through torch.compile: the fallback for everything.

y = RN_x( x W^T + scaling * (x A^T) B^T + bias )

Inductor leaves out the rounding of W to a 16-bit scale's dtype when it fuses it, so what is
declared is ``weight_rounded=False``; that bound holds with the rounding too.

Source: ``int4_lora.reference.int4_lora_linear``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.layout import CheckpointWeight, PreparedWeight
from int4_lora.reference import int4_lora_linear

__all__ = ["DEFINITION"]


def _layer(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    lora = [one.lora_slice() for one in slices] or None
    return int4_lora_linear(x, weight.packed_weight(), lora, adapter_ids, bias)


def _refuses(weight: PreparedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    if isinstance(weight, CheckpointWeight):
        return None
    return "a layout other than the checkpoint's, which would be undone at every call"


DEFINITION = Formulation(
    name="definition", layer=_layer, weight_rounded=False, base_rounded=False, refuses=_refuses
)
