"""The compiled layer: the same function as the reference's, on prepared operands.

y = RN_x( x W^T + scaling * (x A^T) B^T + bias )

The operands are checked here, outside the graphs; the core is arithmetic only. Values are not
checked: an adapter id outside ``[0, adapters)`` adds nothing.

Source: ``int4_lora.reference.int4_lora_linear``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedLoRA, PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.checks import check_operands
from int4_lora.compiled.formulations import Formulation
from int4_lora.compiled.formulations.tiles import base as tiles
from int4_lora.compiled.gradients import differentiable, needs_gradients
from int4_lora.compiled.graphs.cache import in_rows, state_of
from int4_lora.compiled.graphs.entry import Entry, plan
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.selection.choice import choose

__all__ = ["BoundLayer", "any_tokens", "formulation_for", "int4_linear", "int4_lora_linear"]

MOST_ENTRIES = 64  # per bound layer; the oldest makes room, and is planned again where it is met


def int4_linear(x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
    """Apply an INT4 linear layer: ``y = RN_x(x W^T + bias)``.

    Args:
        x: ``[tokens, in_features]``, float16, bfloat16, float32 or float64; tokens may be 0.
        weight: returned by ``prepare``.
        bias: ``[out_features]``, float, or None.

    Returns:
        ``[tokens, out_features]`` in the dtype of x.

    Raises:
        TypeError: an operand has the wrong type or dtype.
        ValueError: an operand has the wrong shape or device.

    Example:
        >>> from int4_lora.compiled import prepare
        >>> from int4_lora.reference import quantize
        >>> weight = quantize(torch.randn(32, 256), group_size=128)
        >>> int4_linear(torch.randn(3, 256), prepare(weight)).shape
        torch.Size([3, 32])

    Source:
        ``int4_lora.reference.int4_linear``.
    """
    return int4_lora_linear(x, weight, bias=bias)


def int4_lora_linear(
    x: Tensor,
    weight: PreparedWeight,
    lora: PreparedLoRA | None = None,
    adapter_ids: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply an INT4 linear layer with an adapter for each token.

    Differentiable in x, the adapters and the bias. Within another ``torch.compile``, the layer
    becomes part of that graph.

    Args:
        x: ``[tokens, in_features]``, float16, bfloat16, float32 or float64; tokens may be 0.
        weight: returned by ``prepare``.
        lora: returned by ``prepare_lora``, or None.
        adapter_ids: int32 or int64 ``[tokens]``; an id outside ``[0, adapters)`` means no
            adapter. Needed with ``lora``.
        bias: ``[out_features]``, float, or None.

    Returns:
        ``[tokens, out_features]`` in the dtype of x. ``formulation_for`` returns the formulation
        used, which declares its roundings.

    Raises:
        TypeError: an operand has the wrong type or dtype.
        ValueError: an operand has the wrong shape or device.

    Example:
        >>> from int4_lora.compiled import prepare, prepare_lora
        >>> from int4_lora.reference import LoRAStack, quantize
        >>> weight = prepare(quantize(torch.randn(32, 256), group_size=128))
        >>> lora = prepare_lora(LoRAStack.stack([(torch.ones(2, 256), torch.ones(32, 2), 0.5)]))
        >>> int4_lora_linear(torch.randn(3, 256), weight, lora, torch.tensor([0, -1, 0])).shape
        torch.Size([3, 32])

    Source:
        ``int4_lora.reference.int4_lora_linear``.
    """
    slices = check_operands(x, weight, lora, adapter_ids, bias)
    if not slices:
        adapter_ids = None
    forward = _without_autocast if torch.is_autocast_enabled(x.device.type) else _forward
    if needs_gradients(x, slices, bias):
        return differentiable(forward, x, weight, slices, adapter_ids, bias)
    return forward(x, weight, slices, adapter_ids, bias)


def formulation_for(
    weight: PreparedWeight, dtype: torch.dtype, tokens: int, lora: PreparedLoRA | None = None
) -> Formulation:
    """Return the formulation that computes a layer; it declares its roundings.

    Args:
        weight: returned by ``prepare``.
        dtype: the dtype of x.
        tokens: rows of x.
        lora: returned by ``prepare_lora``, or None.

    Example:
        >>> from int4_lora.compiled import prepare
        >>> from int4_lora.reference import quantize
        >>> weight = prepare(quantize(torch.randn(8, 6), group_size=3))
        >>> formulation_for(weight, torch.float32, 5).name
        'definition'
    """
    return choose(weight, dtype, tokens, () if lora is None else lora.slices)


def any_tokens(
    x: Tensor,
    weight: PreparedWeight,
    lora: PreparedLoRA | None,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return the layer as part of a graph that is traced once for any number of tokens.

    Engines drop the graph's guards, so nothing may be chosen by the number of tokens: ``tiles``
    always computes the base, ``gathered`` the adapters. The operands are not checked.

    Args:
        x: ``[tokens, in_features]``.
        weight: returned by ``prepare``.
        lora: returned by ``prepare_lora``, or None.
        adapter_ids: int32 or int64 ``[tokens]``; needed with ``lora``.
        bias: ``[out_features]`` or None.
    """
    slices = () if lora is None else lora.slices
    return add_terms(tiles(x, weight), x, slices, adapter_ids, bias, any_tokens=True)


class BoundLayer:
    """``int4_lora_linear`` with a fixed weight, adapters and bias, at the lowest cost per call.

    Between the layers of a model, processor caches are cold and Python is slow: checks and the
    lookup of a graph take 0.15 ms. So the entry of each call is kept, and later calls with the same
    key skip both.

    Args:
        weight: returned by ``prepare``; its tensors may be written to, not replaced.
        lora: returned by ``prepare_lora``; its tensors may be written to, not replaced.
        bias: ``[out_features]`` or None; it may be written to, not replaced.

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
        self._entries: dict[Hashable, Entry] = {}

    def __call__(self, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """Return ``int4_lora_linear`` of x and the bound operands.

        Args:
            x: ``[tokens, in_features]``.
            adapter_ids: int32 or int64 ``[tokens]``.
        """
        key = self._key(x, adapter_ids)
        entry = self._entries.get(key)
        if entry is not None:
            return entry(x, adapter_ids)
        slices = check_operands(x, self.weight, self.lora, adapter_ids, self.bias)
        if not self._keeps(x):
            return int4_lora_linear(x, self.weight, self.lora, adapter_ids, self.bias)
        entry = plan(x, self.weight, slices, adapter_ids, self.bias)
        if key == self._key(x, adapter_ids):  # else update() ran meanwhile
            self._keep(key, entry)
        return entry(x, adapter_ids)

    def _keep(self, key: Hashable, entry: Entry) -> None:
        """Keep an entry; another thread may do the same."""
        entries = self._entries
        while len(entries) >= MOST_ENTRIES:
            entries.pop(next(iter(list(entries))), None)
        entries[key] = entry

    def _keeps(self, x: Tensor) -> bool:
        """Return whether the entry of a call may be kept."""
        unusual = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
        copied = in_rows(self.bias) is not self.bias  # later writes would be missed
        return not (unusual or copied or x.shape[0] == 0)

    def _key(self, x: Tensor, adapter_ids: Tensor) -> Hashable:
        """Return the state that an entry is valid for."""
        finite = tuple([part.finite for part in self.lora.slices])
        return x.shape, adapter_ids.shape, finite, state_of(x, adapter_ids)


def _forward(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if torch.compiler.is_compiling():
        formulation = choose(weight, x.dtype, x.shape[0], slices)
        return formulation.layer(x, weight, slices, adapter_ids, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.out_features)
    with torch.no_grad():
        return plan(x, weight, slices, adapter_ids, bias)(x, adapter_ids)


def _without_autocast(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return the layer without autocast, so that products keep the dtypes of their factors."""
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, weight, slices, adapter_ids, bias)
