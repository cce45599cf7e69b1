"""A weight in the one layout that it is computed in, from which the checkpoint's tensors come back.

Three layouts exist, each a class with its own file: ``Int4PackWeight`` (torch's CPU operator),
``PlanesWeight`` (every word's codes belong to eight contiguous planes of x), and
``CheckpointWeight`` (the checkpoint's own tensors, for everything else). A weight is held once.

Source: the contract of ``int4_lora.compiled``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, dequantize

__all__ = ["CheckpointWeight", "PreparedWeight", "in_blocks"]

ROWS = 64  # that are laid out at a time, a multiple of every layout's blocks
BESIDE_THE_WORDS = ("scale", "zero_point", "g_idx")


def blocks_of(rows: int) -> Iterator[tuple[int, int]]:
    """Yield where each block of rows starts and stops."""
    for start in range(0, rows, ROWS):
        yield start, min(start + ROWS, rows)


def in_blocks(rows: int, part: Callable[[int, int], Tensor]) -> Tensor:
    """Return ``part(start, stop)`` of all rows, a block of them at a time.

    Codes of 4 bits become numbers of 32 on the way: of a whole layer that would be 8 times its
    size.

    Args:
        rows: how many.
        part: makes as many rows as it is asked for.
    """
    first = part(0, min(rows, ROWS))
    if rows <= ROWS:
        return first
    whole = first.new_empty(rows, *first.shape[1:])
    whole[:ROWS] = first
    for start, stop in blocks_of(rows):
        if start:
            whole[start:stop] = part(start, stop)
    return whole


class PreparedWeight(ABC):
    """An INT4 weight as ``prepare`` laid it out; the formulations take it.

    Source:
        The contract of ``int4_lora.compiled``.
    """

    shape: tuple[int, int]
    scale_dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its tensors are."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all its tensors together."""

    def packed_weight(self) -> PackedWeight:
        """Return the checkpoint's tensors, bit for bit."""
        return self.with_words(in_blocks(self.out_features, self.packed_rows))

    @abstractmethod
    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of some rows.

        Args:
            start: the first row, a multiple of ``tile``.
            stop: the row after the last.

        Returns:
            int32 ``[stop - start, words of a row]``.
        """

    @abstractmethod
    def with_words(self, packed: Tensor) -> PackedWeight:
        """Return the checkpoint's other tensors, bit for bit, with these words."""

    def holds(self, weight: PackedWeight) -> bool:
        """Return whether ``packed_weight`` gives these very bits, a block of rows at a time."""
        own = self.with_words(weight.packed)
        if (own.shape, own.bits, own.strategy) != (weight.shape, weight.bits, weight.strategy):
            return False
        pairs = [(getattr(own, name), getattr(weight, name)) for name in BESIDE_THE_WORDS]
        if not all(one is other or _same(one, other) for one, other in pairs):
            return False
        return all(
            torch.equal(self.packed_rows(start, stop), weight.packed[start:stop])
            for start, stop in blocks_of(self.out_features)
        )

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight: ``RN_scale((q - z) * s)``, then cast.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: what to cast to.

        Returns:
            ``[stop - start, in_features]``.
        """

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """What a graph is specialised on: shapes, dtypes and static fields, no values."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return (type(self), *(_described(field) for field in fields))

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, in the order of its fields."""
        return tuple(_tensors(self))

    @property
    @abstractmethod
    def tile(self) -> int:
        """The number of rows that ``rows`` should be asked for at multiples of."""


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a dataclass, and of those in it."""
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        part = getattr(value, field.name)
        if isinstance(part, Tensor):
            yield part
        elif dataclasses.is_dataclass(part):
            yield from _tensors(part)


def _described(value: object) -> object:
    """Return a field as part of a signature."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    if isinstance(value, PackedWeight):
        return tuple(_described(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value


@dataclass(frozen=True, eq=False)
class CheckpointWeight(PreparedWeight):
    """The checkpoint's own tensors, for what the other layouts cannot take.

    Args:
        weight: those tensors.
    """

    weight: PackedWeight

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns."""
        return self.weight.shape

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that weights are rounded in."""
        return self.weight.scale.dtype

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.weight.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors together."""
        return self.weight.nbytes

    @property
    def tile(self) -> int:
        """All rows at once: blocks of rows share scales, zero-points share words."""
        return self.out_features

    def packed_weight(self) -> PackedWeight:
        """Return the checkpoint's tensors."""
        return self.weight

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of some rows."""
        return self.weight.packed[start:stop]

    def with_words(self, packed: Tensor) -> PackedWeight:
        """Return the checkpoint's other tensors with these words."""
        return dataclasses.replace(self.weight, packed=packed)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight."""
        return dequantize(self.weight, dtype)[start:stop]
