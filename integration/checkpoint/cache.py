"""Cache dense weights within a budget of bytes, evicting the least recently used first."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from int4_lora.reference import dequantize
from int4_lora.reference.float4_weight import BaseWeight, check_weight, dense_dtype

__all__ = ["UnpackedWeightCache"]


class _Entry(NamedTuple):
    """A dense weight, and the versions of its source and of itself for which it is valid."""

    weight: weakref.ref[BaseWeight]
    source: tuple[int, ...]
    dense: Tensor
    version: int


class UnpackedWeightCache:
    """A cache of dense weights by packed weight, of at most ``max_bytes``.

    A dense weight is returned again only for the same weight object, and only while
    neither its tensors nor the dense tensor have been written to: PyTorch counts the writes. After
    a write that PyTorch cannot count (through ``.data``, NumPy or another process), call
    ``discard``. Weights with tensors made in inference mode, or that require gradients, are never
    kept, because PyTorch does not count all writes to them (fused optimizers); nor is a dense
    tensor that is larger than the budget. An evicted or cleared tensor is freed as soon as no
    caller holds it. All methods may be called from any thread.

    Args:
        max_bytes: the most bytes of dense tensors to keep; 0 keeps none.

    Raises:
        TypeError: ``max_bytes`` is not an int.
        ValueError: ``max_bytes`` is negative.

    Example:
        >>> from int4_lora.reference import PackedWeight
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> cache = UnpackedWeightCache(max_bytes=2**20)
        >>> cache.get(weight) is cache.get(weight), cache.nbytes
        (True, 32)
    """

    def __init__(self, max_bytes: int) -> None:
        if type(max_bytes) is not int:
            raise TypeError(f"max_bytes must be an int, got {type(max_bytes).__name__}")
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.max_bytes = max_bytes
        # By id of the weight and dtype, least recently used first. A weight that is collected
        # removes its entry without the lock, which the collecting thread may hold already.
        self._entries: dict[tuple[int, torch.dtype], _Entry] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """The bytes of the dense tensors in the cache."""
        with self._lock:
            return self._total()

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __contains__(self, weight: object) -> bool:
        """Return whether a dense tensor of this weight object is kept, in any dtype."""
        with self._lock:
            return any(key[0] == id(weight) for key in list(self._entries))

    def get(self, weight: BaseWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight, unpacked now or kept from an earlier call.

        Args:
            weight: the packed weight, INT4, INT8 or FP4.
            dtype: the dtype of the result; None means the scale's dtype, bfloat16 for FP4.

        Returns:
            ``[out_features, in_features]``; do not write to it, because all callers share it
            (after a write, the next caller gets a new tensor).

        Raises:
            TypeError: ``weight`` is neither a PackedWeight nor a Float4Weight, or ``dtype`` is not
                a float dtype.
        """
        check_weight(weight)
        key = (id(weight), dense_dtype(weight) if dtype is None else dtype)
        with self._lock:
            kept = self._find(key, weight)
        if kept is not None:
            return kept
        source = _fingerprint(weight)
        with torch.inference_mode(False), torch.no_grad():  # so that writes to it are counted
            dense = dequantize(weight, dtype)
        with self._lock:
            kept = self._find(key, weight)
            if kept is not None:
                return kept  # another thread stored it meanwhile: all callers share one tensor
            if source is None or source != _fingerprint(weight):
                return dense  # untracked, or written to while it was unpacked
            if dense.nbytes > self.max_bytes:
                return dense
            while self._total() + dense.nbytes > self.max_bytes:
                for oldest in list(self._entries)[:1]:
                    self._entries.pop(oldest, None)
            alive = weakref.ref(weight, lambda _: self._entries.pop(key, None))
            self._entries[key] = _Entry(alive, source, dense, dense._version)
        return dense

    def discard(self, weight: BaseWeight) -> None:
        """Drop the dense tensors of ``weight``, if the cache holds any."""
        with self._lock:
            for key in [key for key in list(self._entries) if key[0] == id(weight)]:
                self._entries.pop(key, None)

    def clear(self) -> None:
        """Drop every dense tensor."""
        with self._lock:
            self._entries.clear()

    def _find(self, key: tuple[int, torch.dtype], weight: BaseWeight) -> Tensor | None:
        """Return a kept dense weight and mark it as used; drop it if it is stale."""
        entry = self._entries.pop(key, None)
        if (
            entry is None
            or entry.weight() is not weight
            or entry.source != _fingerprint(weight)
            or entry.version != entry.dense._version
        ):
            return None
        self._entries[key] = entry
        return entry.dense

    def _total(self) -> int:
        return sum(entry.dense.nbytes for entry in list(self._entries.values()))


def _fingerprint(weight: BaseWeight) -> tuple[int, ...] | None:
    """Return the address and number of writes of each of the weight's tensors; None if unknown."""
    fields = [getattr(weight, field.name) for field in dataclasses.fields(weight)]
    present = [field for field in fields if isinstance(field, Tensor)]
    if any(tensor.is_inference() or tensor.requires_grad for tensor in present):
        return None  # inference mode and fused optimizers write without counting
    return tuple(number for tensor in present for number in (tensor.data_ptr(), tensor._version))
