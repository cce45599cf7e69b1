"""A formulation: a base, the layout it needs, and what it declares of itself.

The layer is written once: the adapters and the bias are added to every base by ``add_terms``.

Source: ``docs/numerics.md`` for the roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.layouts.layout import PreparedWeight

__all__ = ["Backend", "Formulation"]

Backend = Callable[..., Any] | str  # what torch.compile accepts as backend=


def _no_limit(weight: Any, dtype: torch.dtype, tokens: int) -> str | None:
    return None


@dataclass(frozen=True)
class Formulation:
    """One way to compute the layer.

    Args:
        name: the name in tables and logs.
        base: ``base(x, weight)`` returns ``x W^T`` ``[tokens, out_features]``, in the dtype of x or
            of sums. Pure PyTorch without checks, and independent of values, so that it traces into
            one graph.
        layout: the class of weights that ``base`` reads.
        weight_rounded: whether ``(q - z) * s`` is rounded to the scale's dtype, as declared.
        base_rounded: whether the base is rounded to x's dtype before a delta or bias is added.
        limit: ``limit(weight, dtype of x, tokens)`` returns why ``base`` cannot take them, or None.
        devices: the types of devices it is meant for; it is right on every one.
        cancellation: how far its sums may be off beyond the bound of its roundings, as a factor of
            the sum of |x| |s| over a row.
        most_rank: the largest rank of adapters that it takes, or None for any.
        one_call: whether the base alone is one call of an operator, with nothing to compile.
        backend: ``backend(weight, bucket)`` returns what compiles the layer. None means Inductor
            with its defaults; only then can another graph inline the layer.
    """

    name: str
    base: Callable[[Tensor, Any], Tensor]
    layout: type
    weight_rounded: bool
    base_rounded: bool
    limit: Callable[[Any, torch.dtype, int], str | None] = _no_limit
    devices: tuple[str, ...] = ("cpu", "cuda")
    cancellation: float = 0.0
    most_rank: int | None = None
    one_call: bool = False
    backend: Callable[[Any, tuple[int, int]], Backend] | None = None

    def layer(
        self,
        x: Tensor,
        weight: PreparedWeight,
        slices: Sequence[PreparedSlice],
        adapter_ids: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Return ``RN_x(base + deltas + bias)``.

        Args:
            x: ``[tokens, in_features]``.
            weight: an instance of ``layout``.
            slices: the adapters, by slice of the outputs.
            adapter_ids: int ``[tokens]``; needed with slices. An id outside ``[0, adapters)``
                contributes nothing.
            bias: ``[out_features]`` or None.
        """
        base = self.base(x, weight)
        if not slices and bias is None:
            return base.to(x.dtype)
        return add_terms(base, x, slices, adapter_ids, bias)

    def refuses(self, weight: PreparedWeight, dtype: torch.dtype, tokens: int) -> str | None:
        """Return why it cannot take a weight, a dtype of x and a number of tokens, or None."""
        if not isinstance(weight, self.layout):
            return f"the layout of {type(weight).__name__}, not of {self.layout.__name__}"
        return self.limit(weight, dtype, tokens)

    def takes(
        self,
        weight: PreparedWeight,
        dtype: torch.dtype,
        tokens: int,
        slices: Sequence[PreparedSlice] = (),
    ) -> bool:
        """Return whether it is meant for the weight's device and takes the operands."""
        if self.most_rank is not None and any(part.rank > self.most_rank for part in slices):
            return False
        meant = weight.device.type in self.devices
        return meant and self.refuses(weight, dtype, tokens) is None
