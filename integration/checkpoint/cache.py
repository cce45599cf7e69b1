"""Dense weights kept for reuse, within a budget of bytes.

Source: the contract of ``int4_lora.integration``; the policy is least recently used.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, dequantize

__all__ = ["UnpackedWeightCache"]

Key: TypeAlias = tuple[int, torch.dtype]  # id of the weight, dtype of the dense tensor


@dataclass(frozen=True, eq=False)
class _Entry:
    """A dense weight, and what must still hold for it to be right."""

    weight: weakref.ref[PackedWeight]
    source: tuple[int, ...]
    dense: Tensor
    version: int


class UnpackedWeightCache:
    """Dense weights by the packed weight they came from, at most ``max_bytes`` of them.

    An entry is served only for the very object it was made from, while neither that weight's
    tensors nor the dense tensor have been written to since: PyTorch counts the writes. Writes it
    cannot count (through ``.data``, NumPy or another process) call for ``discard``. A dense
    tensor that the budget cannot hold is returned and not kept; weights with tensors made in
    inference mode, or that want gradients, are never kept, since PyTorch does not count all
    writes to them (fused optimizers). What is evicted or cleared is freed as
    soon as no caller holds it. All methods may be called from any thread.

    Args:
        max_bytes: the most bytes of dense tensors to keep; 0 keeps none.

    Raises:
        TypeError: ``max_bytes`` is not an int.
        ValueError: ``max_bytes`` is negative.

    Example:
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> cache = UnpackedWeightCache(max_bytes=2**20)
        >>> cache.get(weight) is cache.get(weight), cache.nbytes
        (True, 32)

    Source:
        The request this project began with asks for unpacked weights with a cache.
    """

    def __init__(self, max_bytes: int) -> None:
        if type(max_bytes) is not int:
            raise TypeError(f"max_bytes must be an int, got {type(max_bytes).__name__}")
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, got {max_bytes}")
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._lock = threading.Lock()
        self._dead: deque[Key] = deque()  # keys of weights collected while the lock was held

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensors that are kept now."""
        with self._lock:
            self._bury()
            return self._nbytes

    def __len__(self) -> int:
        with self._lock:
            self._bury()
            return len(self._entries)

    def __contains__(self, weight: object) -> bool:
        """Return whether a dense tensor of that very weight is kept, of whatever dtype."""
        with self._lock:
            self._bury()
            return any(key[0] == id(weight) for key in self._entries)

    def get(self, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight, unpacked now or kept from an earlier call.

        Args:
            weight: the packed weight.
            dtype: of the result; None means the scale's dtype.

        Returns:
            ``[out_features, in_features]``; shared with every caller, so not to be written to
            (a write is noticed, and the entry made anew for the next caller).

        Raises:
            TypeError: ``weight`` is no PackedWeight, or ``dtype`` not a float dtype.
        """
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"weight must be a PackedWeight, got {type(weight).__name__}")
        key = (id(weight), weight.scale.dtype if dtype is None else dtype)
        source = _fingerprint(weight)
        with self._lock:
            self._bury()
            entry = self._entries.get(key)
            if entry is not None:
                if _is_fresh(entry, weight, source):
                    self._entries.move_to_end(key)
                    return entry.dense
                self._drop(key)
        with torch.inference_mode(False), torch.no_grad():  # so that writes to it are counted
            dense = dequantize(weight, dtype)
        if source is None or _fingerprint(weight) != source:
            return dense  # untracked, or written to while it was unpacked
        return self._keep(key, weight, source, dense)

    def discard(self, weight: PackedWeight) -> None:
        """Forget what was made from ``weight``; nothing happens if there is nothing."""
        with self._lock:
            self._bury()
            for key in [key for key in self._entries if key[0] == id(weight)]:
                self._drop(key)

    def clear(self) -> None:
        """Forget everything, and give the memory back."""
        with self._lock:
            self._dead.clear()
            self._entries.clear()
            self._nbytes = 0

    def _keep(
        self, key: Key, weight: PackedWeight, source: tuple[int, ...], dense: Tensor
    ) -> Tensor:
        with self._lock:
            self._bury()
            entry = self._entries.get(key)
            if entry is not None and _is_fresh(entry, weight, source):
                return entry.dense  # another thread was first: all callers share one tensor
            if entry is not None:
                self._drop(key)
            if dense.nbytes > self.max_bytes:
                return dense
            while self._nbytes + dense.nbytes > self.max_bytes:
                self._drop(next(iter(self._entries)))
            alive = weakref.ref(weight, lambda _: self._collected(key))
            self._entries[key] = _Entry(alive, source, dense, dense._version)
            self._nbytes += dense.nbytes
        return dense

    def _collected(self, key: Key) -> None:
        """Drop the entry of a weight that was collected, at once if no thread holds the lock."""
        self._dead.append(key)
        if self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        """Drop the entries of collected weights; the lock is held."""
        while self._dead:
            key = self._dead.popleft()
            entry = self._entries.get(key)
            if entry is not None and entry.weight() is None:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        self._nbytes -= self._entries.pop(key).dense.nbytes


def _is_fresh(entry: _Entry, weight: PackedWeight, source: tuple[int, ...] | None) -> bool:
    """Return whether an entry was made from this very weight as it is now."""
    return (
        entry.weight() is weight
        and entry.source == source
        and entry.dense._version == entry.version
    )


def _fingerprint(weight: PackedWeight) -> tuple[int, ...] | None:
    """Return where the weight's tensors are and how often they were written; None if unknown."""
    tensors = (weight.packed, weight.scale, weight.zero_point, weight.g_idx)
    present = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.is_inference() or tensor.requires_grad for tensor in present):
        return None  # inference mode and fused optimizers write without counting
    return tuple(number for tensor in present for number in (tensor.data_ptr(), tensor._version))
