"""A layer whose weight, adapters and bias stay the same objects, called at the least cost.

Between the layers of a model processor caches are cold, and Python is slow: the checks of
``int4_lora_linear`` and the key of its graph take 0.15 ms, as long as an adapter's sums for 8
tokens. Here what a call was found to need is kept by its number of tokens: the graph, and its
inputs but x and the ids. A call that is like one before goes to the graph; any other goes the usual
way.

Source: ``int4_lora.compiled.linear``, whose results these are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedLoRA
from int4_lora.compiled.gradients import needs_gradients
from int4_lora.compiled.graphs.cache import graph_of
from int4_lora.compiled.graphs.direct_entry import DirectEntry, modes
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.linear import int4_lora_linear
from int4_lora.compiled.selection.choice import choose

__all__ = ["BoundLayer"]

MOST_CALLS = 64  # numbers of tokens that are kept


@dataclass(frozen=True)
class _Call:
    """What a call needed.

    Args:
        met: what it was told by.
        graph: the compiled graph.
        inputs: of the graph.
        x: the place of x among them.
        ids: the place of the ids.
    """

    met: Hashable
    graph: Callable[..., Sequence[Tensor]]
    inputs: tuple[Any, ...]
    x: int
    ids: int


class BoundLayer:
    """``int4_lora_linear`` of one weight, its adapters and its bias.

    Args:
        weight: what ``prepare`` returned; its tensors may be written to, not replaced.
        lora: what ``prepare_lora`` returned; likewise.
        bias: ``[out_features]`` or None; likewise.

    Example:
        >>> from int4_lora.compiled import prepare, prepare_lora
        >>> from int4_lora.reference import LoRAStack, quantize
        >>> weight = prepare(quantize(torch.randn(32, 256), group_size=128))
        >>> lora = prepare_lora(LoRAStack.stack([(torch.ones(2, 256), torch.ones(32, 2), 0.5)]))
        >>> BoundLayer(weight, lora)(torch.randn(3, 256), torch.tensor([0, -1, 0])).shape
        torch.Size([3, 32])
    """

    def __init__(
        self, weight: PreparedWeight, lora: PreparedLoRA, bias: Tensor | None = None
    ) -> None:
        self.weight, self.lora, self.bias = weight, lora, bias
        self._calls: dict[int, _Call] = {}

    def __call__(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """Return what ``int4_lora_linear`` does.

        Args:
            x: ``[tokens, in_features]``.
            adapter_ids: int32 or int64 ``[tokens]``.
        """
        call = self._calls.get(x.shape[0])
        if call is not None and call.met == self._met(x, adapter_ids):
            inputs = list(call.inputs)
            inputs[call.x], inputs[call.ids] = x, adapter_ids
            return call.graph(*inputs)[0]
        y = int4_lora_linear(x, self.weight, self.lora, adapter_ids, self.bias)
        self._note(x, adapter_ids)
        return y

    def _met(self, x: Tensor, adapter_ids: Tensor) -> Hashable:
        """Return all that a call may differ in from another of as many tokens."""
        return (
            x.shape,
            x.dtype,
            x.device,
            x.is_contiguous() and not x.is_neg(),
            x.is_inference(),
            x.requires_grad,
            type(x),
            adapter_ids.shape,
            adapter_ids.dtype,
            adapter_ids.device,
            adapter_ids.is_contiguous() and not adapter_ids.is_neg(),
            adapter_ids.is_inference(),
            type(adapter_ids),
            tuple([one.finite for one in self.lora.slices]),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled(x.device.type),
            modes(),
        )

    def _note(self, x: Tensor, adapter_ids: Tensor) -> None:
        """Keep what a call needed, if the next one like it can go to its graph."""
        slices, bias = self.lora.slices, self.bias
        unusual = torch.is_autocast_enabled(x.device.type) or needs_gradients(x, slices, bias)
        operands = [x, adapter_ids, *([] if bias is None else [bias])]
        plain = type(x) is Tensor and type(adapter_ids) is Tensor
        whole = all(one.is_contiguous() and not one.is_neg() for one in operands)
        some = x.shape[0] > 0  # no tokens have no graph
        if unusual or not (some and plain and whole) or len(self._calls) >= MOST_CALLS:
            return
        formulation = choose(self.weight, x.dtype, x.shape[0], slices)
        entry = graph_of(formulation, x, self.weight, slices, adapter_ids, bias)
        if not isinstance(entry, DirectEntry):
            return
        found = entry.direct((x, self.weight, slices, adapter_ids, bias))
        if found is None:
            return
        graph, inputs = found
        places = [
            [place for place, one in enumerate(inputs) if one is given]
            for given in (x, adapter_ids)
        ]
        if [len(one) for one in places] == [1, 1]:
            met = self._met(x, adapter_ids)
            self._calls[x.shape[0]] = _Call(met, graph, inputs, places[0][0], places[1][0])
