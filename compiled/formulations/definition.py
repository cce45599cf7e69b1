"""The reference's forward, unmodified, through torch.compile: the fallback for everything.

y = RN_x( x W^T + scaling * (x A^T) B^T + bias )

Inductor leaves out the rounding of W to a 16-bit scale's dtype where it fuses the product, so
``weight_rounded=False`` is declared. Its bound holds with the rounding, too. That of an FP4 weight
does not: the float64 truth is not rounded to bfloat16. So FP4 is left to ``tiles``.

Source: ``int4_lora.reference.int4_lora_linear``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.checkpoint import CheckpointWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference import Float4Weight, int4_linear, int4_lora_linear

__all__ = ["DEFINITION"]


def base(x: Tensor, weight: CheckpointWeight) -> Tensor:
    """Return ``x W^T`` in the dtype of x."""
    return int4_linear(x, weight.weight)


def _limit(weight: CheckpointWeight, dtype: torch.dtype, tokens: int) -> str | None:
    if isinstance(weight.weight, Float4Weight):
        return "FP4, which a graph may or may not round"
    return None


class Definition(Formulation):
    """The only formulation whose layer is the reference's, not a base with terms added to it."""

    def layer(
        self,
        x: Tensor,
        weight: PreparedWeight,
        slices: Sequence[PreparedSlice],
        adapter_ids: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Return the reference's ``int4_lora_linear`` on the checkpoint's tensors."""
        lora = [part.lora_slice() for part in slices] or None
        return int4_lora_linear(x, weight.packed_weight(), lora, adapter_ids, bias)


DEFINITION = Definition(
    name="definition",
    base=base,
    layout=CheckpointWeight,
    weight_rounded=False,
    base_rounded=False,
    limit=_limit,
)
