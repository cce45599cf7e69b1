"""Which weights of adapters are finite, looked at once however often an adapter is put in a slot.

Source: ``int4_lora.compiled.adapters.prepared.PreparedSlice.note_finite``, which is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FiniteWeights"]


class FiniteWeights:
    """Remembers of each tensor whether it is finite, as long as it lives and is not written to.

    vLLM holds the weights of loaded adapters on the CPU, and copies the same tensors to a slot
    whenever their adapter becomes active.
    """

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()  # to (version, dtype, finite)

    def of(self, weights: Iterable[Tensor], dtype: torch.dtype) -> bool:
        """Return whether all weights are finite after a cast.

        Args:
            weights: of any float dtype.
            dtype: that of the slots, which they are cast to.
        """
        return all(self._is_finite(weight, dtype) for weight in weights)

    def _is_finite(self, weight: Tensor, dtype: torch.dtype) -> bool:
        if weight.is_inference():  # torch does not count the writes to it
            return _look(weight, dtype)
        state = (weight._version, dtype)
        known = self._known.get(weight)
        if known is None or known[0] != state:
            known = self._known[weight] = (state, _look(weight, dtype))
        return bool(known[1])


def _look(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a weight is finite, by one read: NaN is the least and the largest."""
    extremes = weight.to(dtype).aminmax() if weight.numel() else ()
    return all(math.isfinite(extreme.item()) for extreme in extremes)
