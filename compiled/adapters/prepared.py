"""Adapters as the compiled path reads them: b stored ``[adapters, rank, out]``, changed in place.

Source: the contract of ``int4_lora.compiled``; the layout lets the sum over the rank run over
consecutive outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, LoRAStack

__all__ = ["PreparedLoRA", "PreparedSlice"]


@dataclass(frozen=True, eq=False)
class PreparedSlice:
    """The adapters of one slice of a layer's outputs.

    Args:
        a: ``[adapters, rank, in_features]``.
        bt: ``[adapters, rank, out]``, of the same dtype: b transposed.
        scaling: float32 or float64 ``[adapters]``.
        start: the first output that the slice writes.
        finite: whether ``bt`` holds neither NaN nor infinity; ``PreparedLoRA.update`` looks.
    """

    a: Tensor
    bt: Tensor
    scaling: Tensor
    start: int
    finite: bool = True

    @property
    def adapters(self) -> int:
        """How many adapters there are to choose from."""
        return self.a.shape[0]

    @property
    def rank(self) -> int:
        """The rank all adapters are padded to."""
        return self.a.shape[1]

    @property
    def stop(self) -> int:
        """The output after the last that the slice writes."""
        return self.start + self.bt.shape[2]

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Its tensors: a, bt and scaling."""
        return self.a, self.bt, self.scaling

    @cached_property
    def signature(self) -> tuple[Hashable, ...]:
        """What graphs are specialised on: shapes, strides and dtypes, no values."""
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

    def refresh_finite(self) -> None:
        """Set ``finite`` from ``bt``; call it after writing to ``bt`` other than by ``update``."""
        object.__setattr__(self, "finite", bool(self.bt.isfinite().all()))

    def detach(self) -> PreparedSlice:
        """Return it with tensors that want no gradient."""
        return dataclasses.replace(
            self, a=self.a.detach(), bt=self.bt.detach(), scaling=self.scaling.detach()
        )

    def lora_slice(self) -> LoRASlice:
        """Return it as the reference takes it; b is a view."""
        return LoRASlice(LoRAStack(self.a, self.bt.transpose(1, 2), self.scaling), self.start)


@dataclass(frozen=True, eq=False)
class PreparedLoRA:
    """The adapters of one layer, for one or more slices of its outputs.

    Args:
        slices: its slices; all hold as many adapters.

    Raises:
        ValueError: no slices, or slices of different numbers of adapters.

    Source:
        The contract of ``int4_lora.compiled``.
    """

    slices: tuple[PreparedSlice, ...]

    @property
    def adapters(self) -> int:
        """How many adapters there are to choose from."""
        return self.slices[0].adapters

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for one in self.slices for tensor in (one.a, one.bt, one.scaling))

    @torch.no_grad()
    def update(self, adapter: int, given: Sequence[tuple[Tensor, Tensor, float] | None]) -> None:
        """Replace one adapter in place; no graph is compiled again while all B are finite.

        Change adapters only through it: it looks for NaN and infinities in B, which call for
        another graph that keeps them from other adapters' tokens.

        Args:
            adapter: which, in ``[0, adapters)``.
            given: for each slice ``(a [rank, in], b [out, rank], scaling)`` of a rank up to the
                slice's, the rest is filled with zeros; or None for an adapter that leaves the
                slice alone.

        Raises:
            TypeError: a tensor of another dtype than the slice's, or a scaling that is no number.
            ValueError: no such adapter, or shapes that do not fit.

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
            if entry is not None and not bool(entry[1].isfinite().all()):
                object.__setattr__(one, "finite", False)  # before anybody can read such a B
            one.a[adapter].zero_()
            one.bt[adapter].zero_()
            one.scaling[adapter] = 0.0 if entry is None else entry[2]
            if entry is not None:
                rank = entry[0].shape[0]
                one.a[adapter, :rank].copy_(entry[0])
                one.bt[adapter, :rank].copy_(entry[1].T)
            one.refresh_finite()


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
