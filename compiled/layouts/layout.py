"""The interface of a layout, which holds a weight's bits once, in the order that kernels read.

There are five layouts, each in a file of its own: ``Int4PackWeight`` for torch's CPU operator,
``InterleavedWeight`` for kernels that read words, ``Int8Weight`` for 8 bits and
``BlockedFloat4Weight`` for FP4 on a CPU, and ``CheckpointWeight``, the checkpoint's own tensors,
for everything else. Each returns the checkpoint's tensors, bit for bit.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from int4_lora.reference import Float4Weight, PackedWeight
from int4_lora.reference.float4_weight import BaseWeight

__all__ = ["PreparedWeight", "in_blocks"]

BLOCK_ROWS = 64  # rows converted at a time; a multiple of every layout's blocks
BESIDE_THE_WORDS = ("scale", "zero_point", "g_idx", "global_scale")


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    """Yield where each block of rows starts and stops."""
    for start in range(0, rows, BLOCK_ROWS):
        yield start, min(start + BLOCK_ROWS, rows)


def in_blocks(rows: int, convert: Callable[[int, int], Tensor]) -> Tensor:
    """Return ``convert(start, stop)`` of all rows, called for one block of rows at a time.

    Converting widens 4-bit codes to 32 bits, so all rows at once would take 8 times their size.

    Args:
        rows: the number of rows.
        convert: returns the rows from ``start`` to ``stop``.
    """
    first = convert(0, min(rows, BLOCK_ROWS))
    if rows <= BLOCK_ROWS:
        return first
    whole = first.new_empty(rows, *first.shape[1:])
    whole[:BLOCK_ROWS] = first
    for start, stop in _blocks(rows):
        if start:
            whole[start:stop] = convert(start, stop)
    return whole


class PreparedWeight(ABC):
    """A weight in the layout that ``prepare`` chose, as formulations read it."""

    shape: tuple[int, int]
    scale_dtype: torch.dtype

    @property
    def out_features(self) -> int:
        """The rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """The columns of the weight."""
        return self.shape[1]

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the tensors."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The bytes of all tensors together."""

    def packed_weight(self) -> BaseWeight:
        """Return the checkpoint's tensors, bit for bit."""
        return self.with_words(in_blocks(self.out_features, self.packed_rows))

    @abstractmethod
    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of rows ``start`` to ``stop``, of FP4 its bytes.

        Args:
            start: the first row, a multiple of ``tile``.
            stop: the row after the last.

        Returns:
            int32 ``[stop - start, words of a row]``, or uint8.
        """

    @abstractmethod
    def with_words(self, packed: Tensor) -> BaseWeight:
        """Return the checkpoint's other tensors, bit for bit, with these words or bytes."""

    def holds(self, weight: BaseWeight) -> bool:
        """Return whether ``packed_weight`` returns exactly these bits; compare block by block."""
        if type(weight) is not self.kind:
            return False
        held = self.with_words(weight.packed)
        if not _same_beside_the_words(held, weight):
            return False
        return all(
            torch.equal(self.packed_rows(start, stop), weight.packed[start:stop])
            for start, stop in _blocks(self.out_features)
        )

    @abstractmethod
    def part(self, start: int, stop: int) -> PreparedWeight:
        """Return rows as a weight that shares the memory of this weight.

        Its columns have the order of ``rows``, and it serves to compute only. It is another object,
        which does not keep this weight alive.

        Args:
            start: the first row, a multiple of ``tile``.
            stop: the row after the last.
        """

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight: ``RN_scale((q - z) * s)``, then cast.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: the dtype to cast to.

        Returns:
            ``[stop - start, in_features]``.
        """

    def arrange(self, x: Tensor) -> Tensor:
        """Return x with its columns in the order of ``rows``."""
        return x

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight as ``rows`` does, with columns in the order of x."""
        return self.rows(start, stop, dtype)

    def blocks(self, most_rows: int = 1024) -> Iterator[tuple[int, int]]:
        """Yield where to start and to stop, to go through the dense weight in blocks of rows.

        Args:
            most_rows: the rows of a block, unless ``tile`` needs more.
        """
        step = max(1, most_rows // self.tile) * self.tile
        for start in range(0, self.out_features, step):
            yield start, min(start + step, self.out_features)

    @property
    def kind(self) -> type[BaseWeight]:
        """The class of the checkpoint's weight."""
        return PackedWeight

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """What graphs are specialised on: shapes, strides, dtypes, static fields, not values."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return (type(self), *(_described(field) for field in fields))

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order of the fields."""
        return tuple(_tensors(self))

    @property
    @abstractmethod
    def tile(self) -> int:
        """The number of rows such that ``rows`` should start and stop at its multiples."""


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a dataclass and of dataclasses within it."""
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        content = getattr(value, field.name)
        if isinstance(content, Tensor):
            yield content
        elif dataclasses.is_dataclass(content):
            yield from _tensors(content)


def _same_beside_the_words(mine: BaseWeight, given: BaseWeight) -> bool:
    """Return whether two weights of a class have the same bits in all but their words."""
    if (_form(mine), mine.shape) != (_form(given), given.shape):
        return False
    for name in BESIDE_THE_WORDS:
        one, other = getattr(mine, name, None), getattr(given, name, None)
        if one is other:
            continue
        if one is None or other is None or not torch.equal(_comparable(one), _comparable(other)):
            return False
    return True


def _comparable(tensor: Tensor) -> Tensor:
    """Return a tensor that ``torch.equal`` takes: float8 as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _form(weight: BaseWeight) -> tuple[object, ...]:
    """Return the form of a weight's codes and scales, as far as it is no tensor."""
    if isinstance(weight, Float4Weight):
        return (weight.format,)
    return (weight.bits, weight.strategy)


def _described(value: object) -> object:
    """Return the part of a signature that describes a field."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.stride(), value.dtype, value.device)
    if isinstance(value, (PackedWeight, Float4Weight)):
        return tuple(_described(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value
