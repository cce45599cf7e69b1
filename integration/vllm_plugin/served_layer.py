"""One linear layer as the backend runs it: the base weight, the adapters, and who computes what.

The base is computed by ``int4_lora.compiled`` or by vLLM's own kernel; the adapters are computed by
``int4_lora.compiled`` in either case, with the base or added to it.

Source: ``int4_lora.compiled``; vLLM's ``BaseLinearLayerWithLoRA`` for the layout of the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled import PreparedLoRA, PreparedWeight, add_lora, int4_linear
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.graphs.entry import BoundLayer
from int4_lora.compiled.linear import any_tokens
from int4_lora.reference import expand, shrink
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["ServedLayer", "adapters_of"]


class ServedLayer:
    """What the backend knows of one linear layer.

    Args:
        name: the layer's full name in vLLM's model.
        int4: whether its weight is an INT4 weight of the checkpoint.
        stock_because: why vLLM's own kernel computes the base, or None while ours does.
        session: what all layers of the engine share.
    """

    def __init__(
        self, name: str, *, int4: bool, stock_because: str | None = None, session: Any = None
    ) -> None:
        self.name = name
        self.session = session
        self.int4 = int4
        self.stock_because = stock_because
        self.weight: PreparedWeight | None = None
        self.lora: PreparedLoRA | None = None
        self.stock_lora_because: str | None = None
        self._kept: BoundLayer | None = None

    def hold(self, weight: PreparedWeight) -> None:
        """Take a weight; a second one of the same kind is written over the first.

        Where weights are reloaded, captured CUDA graphs go on reading the first one's tensors.
        """
        if self.weight is None or self.weight.signature != weight.signature:
            self.weight = weight
            return
        for old, new in zip(self.weight.tensors, weight.tensors, strict=True):
            old.copy_(new)

    def base(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer without adapters, by our weight: x ``[..., in_features]``."""
        assert self.weight is not None
        rows = x.flatten(0, -2)
        if torch.compiler.is_compiling():
            y = any_tokens(rows, self.weight, None, None, bias)
        else:
            y = int4_linear(rows, self.weight, bias)
        return y.view(*x.shape[:-1], self.weight.out_features)

    def with_adapters(self, x: Tensor, adapter_ids: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer with adapters, by our weight.

        Args:
            x: ``[tokens, in_features]``.
            adapter_ids: int64 ``[tokens]``; one outside the slots means none.
            bias: ``[out_features]`` or None.
        """
        assert self.weight is not None
        if torch.compiler.is_compiling():
            return any_tokens(x, self.weight, self.lora, adapter_ids, bias)
        if _none_active(adapter_ids):
            return int4_linear(x, self.weight, bias)
        return self._bound(bias)(x, adapter_ids)

    def _bound(self, bias: Tensor | None) -> BoundLayer:
        """Return the layer as it is called with adapters."""
        kept = self._kept
        if (
            kept is None
            or kept.weight is not self.weight
            or kept.lora is not self.lora
            or kept.bias is not bias
        ):
            assert self.weight is not None
            assert self.lora is not None
            kept = self._kept = BoundLayer(self.weight, self.lora, bias)
        return kept

    def added(self, base: Tensor, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """Return a base that was computed elsewhere with the adapters added."""
        assert self.lora is not None
        if _none_active(adapter_ids):
            return base
        return add_lora(base, x, self.lora, adapter_ids)

    def plainly_added(self, base: Tensor, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """Return what ``added`` does, by the reference: where that failed its check."""
        assert self.lora is not None
        ids = torch.where(adapter_ids < self.lora.adapters, adapter_ids, -1)
        y = base.to(accumulation_dtype(x), copy=True)
        for one in self.lora.slices:
            stack = one.lora_slice().stack
            y[:, one.start : one.stop] += expand(shrink(x, stack, ids), stack, ids)
        return y.to(base.dtype)


def adapters_of(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> tuple[PreparedLoRA, tuple[Tensor, ...]]:
    """Lay a layer's slots out for the compiled path, and as vLLM writes to them.

    A is shared; B is held once, transposed, and vLLM gets a view of it: what it writes to slots is
    what the compiled path reads.

    Args:
        lora_a: for each slice ``[slots, 1, rank, in_features]``.
        lora_b: for each slice ``[slots, 1, outputs, rank]``, whose values are not looked at.

    Returns:
        The adapters, with scalings of 1 since vLLM multiplies B by them, and what is to stand in
        the place of ``lora_b``.
    """
    slices, views, start = [], [], 0
    for a, b in zip(lora_a, lora_b, strict=True):
        slots, _, outputs, rank = b.shape
        bt = b.new_zeros(slots, rank, outputs)
        slices.append(PreparedSlice(a[:, 0], bt, bt.new_ones(slots, dtype=torch.float32), start))
        views.append(bt.transpose(1, 2).unsqueeze(1))
        start += outputs
    return PreparedLoRA(tuple(slices)), tuple(views)


def _none_active(adapter_ids: Tensor) -> bool:
    """Return whether no token has an adapter; on a GPU a look would have to wait, so False."""
    if torch.compiler.is_compiling() or adapter_ids.device.type != "cpu":
        return False
    return adapter_ids.numel() == 0 or int(adapter_ids.max()) < 0
