"""What a formulation is: a pure function for the layer, and what it declares of itself.

Source: ``docs/numerics.md`` for the roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.layouts.layout import PreparedWeight

__all__ = ["Backend", "Formulation", "Layer"]

Backend = Callable[..., Any] | str  # what torch.compile takes as one
Layer = Callable[
    [Tensor, PreparedWeight, Sequence[PreparedSlice], Tensor | None, Tensor | None], Tensor
]


@dataclass(frozen=True)
class Formulation:
    """One way to compute the layer.

    Args:
        name: what tables and logs call it.
        layer: ``layer(x, weight, slices, adapter_ids, bias)`` in pure PyTorch: no check, no value
            looked at, so that it traces into one graph. An id outside ``[0, adapters)``
            contributes nothing.
        weight_rounded: whether ``(q - z) * s`` is rounded to the scale's dtype, as declared.
        base_rounded: whether the base is rounded to x's dtype before a delta or bias is added.
        refuses: ``refuses(weight, dtype of x, tokens)``, why it cannot take them, or None.
        devices: the types of devices that it is meant for; it is right on every one.
        cancellation: what its sums may be off by beyond the bound of its roundings, as a factor of
            the sum of |x| |s| over a row.
        most_rank: the largest rank of adapters that it takes, or None for any.
        one_call: whether the base alone is one call of an operator, with nothing to compile.
        backend: ``backend(weight, bucket)``, what compiles it; None for Inductor as it is, which
            also lets others' graphs take it in.
    """

    name: str
    layer: Layer
    weight_rounded: bool
    base_rounded: bool
    refuses: Callable[[PreparedWeight, torch.dtype, int], str | None]
    devices: tuple[str, ...] = ("cpu", "cuda")
    cancellation: float = 0.0
    most_rank: int | None = None
    one_call: bool = False
    backend: Callable[[PreparedWeight, tuple[int, int]], Backend] | None = None

    def takes(
        self,
        weight: PreparedWeight,
        dtype: torch.dtype,
        tokens: int,
        slices: Sequence[PreparedSlice] = (),
    ) -> bool:
        """Return whether it is meant for the weight's device and takes the operands."""
        narrow = self.most_rank is None or all(one.rank <= self.most_rank for one in slices)
        here = weight.device.type in self.devices
        return narrow and here and self.refuses(weight, dtype, tokens) is None
