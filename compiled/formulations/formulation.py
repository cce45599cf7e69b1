"""A formulation: a base, the layout that it reads, and the properties that it declares.

The layer is written once: ``add_terms`` adds the adapters and the bias to every base.

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

__all__ = ["Backend", "Blocks", "Formulation", "layer_of"]

Backend = Callable[..., Any] | str  # what torch.compile accepts as backend=


def _no_limit(weight: Any, dtype: torch.dtype, tokens: int) -> str | None:
    return None


@dataclass(frozen=True)
class Blocks:
    """A base computed outside of the layer's graph, block by block of the weight's rows.

    Args:
        rows: the rows of a block.
        dtype: the dtype of both factors and of their product.
        decoded: ``decoded(part, dtype)`` returns the dense weight of a part, transposed.
        in_order: puts the outputs in the order of the rows, if the blocks' are in another order.
    """

    rows: int
    dtype: torch.dtype
    decoded: Callable[[Any, torch.dtype], Tensor]
    in_order: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Formulation:
    """One way to compute the layer.

    Args:
        name: the name in tables and logs.
        base: ``base(x, weight)`` returns ``x W^T`` ``[tokens, out_features]``, in x's dtype or the
            accumulation dtype. It is pure PyTorch without checks and does not branch on values, so
            that it traces into one graph.
        layout: the class of weights that ``base`` reads.
        weight_rounded: whether ``(q - z) * s`` is certain to be rounded to the scale's dtype.
        base_rounded: whether the base is rounded to x's dtype before a delta or bias is added.
        limit: ``limit(weight, dtype of x, tokens)`` returns why ``base`` cannot take them, or None.
        devices: the types of devices it is meant for; its results are right on every type.
        cancellation: how far its sums may be off beyond the bound of its roundings, as a factor of
            the sum of |x| |s| over a row.
        most_rank: the largest rank of adapters that it takes, or None for any.
        one_call: whether the base alone is one call of an operator, with nothing to compile.
        blocks: ``blocks(x, weight)`` returns how to compute the base outside of the layer's graph,
            or None where it is part of it.
        backend: ``backend(weight, bucket)`` returns the backend that compiles the layer. None means
            Inductor with its defaults; only then can another graph inline the layer.
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
    blocks: Callable[[Tensor, Any], Blocks | None] | None = None
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
        return layer_of(self.base(x, weight), x, slices, adapter_ids, bias)

    def refuses(self, weight: PreparedWeight, dtype: torch.dtype, tokens: int) -> str | None:
        """Return why the formulation cannot take a weight, dtype of x and tokens, or None."""
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
        """Return whether the formulation is meant for the device and takes the operands."""
        if self.most_rank is not None and any(part.rank > self.most_rank for part in slices):
            return False
        meant = weight.device.type in self.devices
        return meant and self.refuses(weight, dtype, tokens) is None


def layer_of(
    base: Tensor,
    x: Tensor,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return ``RN_x(base + deltas + bias)`` of a base ``[tokens, out_features]``."""
    if not slices and bias is None:
        return base.to(x.dtype)
    return add_terms(base, x, slices, adapter_ids, bias)
