"""Adapters as the compiled path reads them: b is ``[adapters, rank, out]``, replaced in place.

In this layout each step of the sum over the rank reads consecutive outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, LoRAStack

__all__ = ["PreparedLoRA", "PreparedSlice"]


@dataclass(eq=False)
class PreparedSlice:
    """The adapters of one slice of a layer's outputs.

    Nothing is replaced but ``finite``, which tells whether another graph is needed.

    Args:
        a: ``[adapters, rank, in_features]``.
        bt: ``[adapters, rank, out]``, b transposed, in the dtype of a.
        scaling: float32 or float64 ``[adapters]``.
        start: the first output that the slice writes.
        finite: whether ``bt`` holds neither NaN nor infinity; ``note_finite`` keeps it true.
    """

    a: Tensor
    bt: Tensor
    scaling: Tensor
    start: int
    finite: bool = True
    _not_finite: set[int] = field(default_factory=set, repr=False)

    @property
    def adapters(self) -> int:
        """The number of adapters."""
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        """The rank that all adapters are padded to."""
        return self.a.shape[1]

    @property
    def stop(self) -> int:
        """The output after the last one that the slice writes."""
        return self.start + self.bt.shape[2]

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors a, bt and scaling."""
        return self.a, self.bt, self.scaling

    @cached_property
    def signature(self) -> tuple[Hashable, ...]:
        """What graphs are specialised on: shapes, strides, dtypes and the like, not values."""
        return (
            self.start,
            *(
                (
                    tensor.dtype,
                    tensor.shape,
                    tensor.stride(),
                    tensor.device,
                    type(tensor),
                    tensor.is_inference(),
                )
                for tensor in self.tensors
            ),
        )

    def note_finite(self, adapter: int, finite: bool) -> None:
        """Note whether an adapter's B holds neither NaN nor infinity.

        Whoever writes to ``bt`` without ``PreparedLoRA.update`` calls it: before the write if the
        new B is not finite, so that no call reads such a B through the graph for finite ones; else
        after it.

        Args:
            adapter: the index of the adapter.
            finite: whether all of its B is finite.
        """
        (self._not_finite.discard if finite else self._not_finite.add)(adapter)
        self.finite = not self._not_finite

    def detach(self) -> PreparedSlice:
        """Return the slice with its tensors detached."""
        return dataclasses.replace(
            self, a=self.a.detach(), bt=self.bt.detach(), scaling=self.scaling.detach()
        )

    def lora_slice(self) -> LoRASlice:
        """Return the reference's ``LoRASlice``; its b is a view."""
        return LoRASlice(LoRAStack(self.a, self.bt.transpose(1, 2), self.scaling), self.start)


@dataclass(frozen=True, eq=False)
class PreparedLoRA:
    """The adapters of one layer, for one or more slices of its outputs.

    Args:
        slices: the slices, at least one; all hold the same number of adapters.
    """

    slices: tuple[PreparedSlice, ...]

    @property
    def adapters(self) -> int:
        """The number of adapters."""
        return self.slices[0].adapters

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(tensor.nbytes for one in self.slices for tensor in (one.a, one.bt, one.scaling))

    @torch.no_grad()
    def update(self, adapter: int, given: Sequence[tuple[Tensor, Tensor, float] | None]) -> None:
        """Replace one adapter in place; while all B are finite, no graph is compiled again.

        Change adapters only through this method: it looks for NaN and infinities in B, which need
        another graph that keeps them from other adapters' tokens.

        Args:
            adapter: the index of the adapter, in ``[0, adapters)``.
            given: an entry for each slice: ``(a [rank, in], b [out, rank], scaling)``, whose rank
                is at most the slice's and is padded to it with zeros, or None for an adapter that
                adds nothing to the slice.

        Raises:
            TypeError: a tensor has another dtype than the slice, or a scaling is not a number.
            ValueError: there is no such adapter, or the entries or their shapes do not fit.

        Example:
            >>> from int4_lora.compiled import prepare_lora
            >>> lora = prepare_lora(LoRAStack.stack([(torch.ones(2, 8), torch.ones(4, 2), 1.0)]))
            >>> lora.update(0, [(torch.ones(1, 8), torch.ones(4, 1), 0.5)])
            >>> lora.slices[0].a[0, :, 0]
            tensor([1., 0.])
        """
        if not 0 <= adapter < self.adapters:
            raise ValueError(f"adapter must be in [0, {self.adapters}), got {adapter}")
        if len(given) != len(self.slices):
            raise ValueError(f"one entry per slice is needed, {len(self.slices)}, got {len(given)}")
        for index, (one, entry) in enumerate(zip(self.slices, given, strict=True)):
            if entry is not None:
                _check_entry(index, one, entry)
        for one, entry in zip(self.slices, given, strict=True):
            finite = entry is None or bool(entry[1].isfinite().all())
            if not finite:
                one.note_finite(adapter, False)  # before a call can read such a B
            one.a[adapter].zero_()
            one.bt[adapter].zero_()
            one.scaling[adapter] = 0.0 if entry is None else entry[2]
            if entry is not None:
                rank = entry[0].shape[0]
                one.a[adapter, :rank].copy_(entry[0])
                one.bt[adapter, :rank].copy_(entry[1].T)
            if finite:
                one.note_finite(adapter, True)


def _check_entry(index: int, one: PreparedSlice, entry: tuple[Tensor, Tensor, float]) -> None:
    a, b, scaling = entry
    if not isinstance(scaling, (int, float)):
        found = type(scaling).__name__
        raise TypeError(f"scaling of slice {index} must be a float, got {found}")
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != one.a.dtype:
            raise TypeError(f"{name} of slice {index} must be {one.a.dtype}, got {tensor.dtype}")
    rank = a.shape[0] if a.ndim == 2 else 0
    if not (a.ndim == 2 and 1 <= rank <= one.rank and a.shape[1] == one.a.shape[2]):
        rule = f"[rank <= {one.rank}, {one.a.shape[2]}]"
        raise ValueError(f"a of slice {index} must be {rule}, got {list(a.shape)}")
    if tuple(b.shape) != (one.bt.shape[2], rank):
        rule = f"[{one.bt.shape[2]}, {rank}]"
        raise ValueError(f"b of slice {index} must be {rule}, got {list(b.shape)}")
