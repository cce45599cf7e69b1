"""What makes the tensors of a result: a task has some of them, and writes them piece by piece.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.compressed_tensors import PARTS
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES, read_tensor
from int4_lora.integration.checkpoint.safetensors_header import BITS, StoredTensor
from int4_lora.reference.rounding import round_once

__all__ = [
    "Copy",
    "OutputTensor",
    "Task",
    "Write",
    "cast",
    "dtype_name",
    "source_of",
    "sources_of_module",
]

Write = Callable[[str, int, Tensor], None]  # a tensor's name, the first byte of it, and a piece


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the result.

    Args:
        name: its name.
        dtype: the format's name of the dtype, for example "BF16".
        shape: its shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class Task(ABC):
    """Makes tensors of the result that belong together."""

    outputs: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors together."""
        return sum(one.nbytes for one in self.outputs)

    @property
    @abstractmethod
    def sources(self) -> dict[str, Any]:
        """What it is made of, as JSON: two runs that agree in it make the same bytes."""

    @abstractmethod
    def run(self, write: Write) -> dict[str, Any] | None:
        """Make the tensors and write every byte of them once.

        Args:
            write: takes pieces in any order.

        Returns:
            What there is to report, as JSON, or None.

        Raises:
            ValueError: the source cannot be used; the message names file, tensor and rule.
        """


class Copy(Task):
    """A tensor of the source as it is, or in another floating dtype.

    Args:
        name: its name, which it keeps.
        stored: where it is.
        dtype: to cast to, or None; what is no floating tensor keeps its dtype.
    """

    PIECE = 16 * 2**20  # bytes that are held at a time

    def __init__(self, name: str, stored: StoredTensor, dtype: torch.dtype | None = None) -> None:
        floating = stored.dtype in DTYPES and DTYPES[stored.dtype].is_floating_point
        self.name, self.stored = name, stored
        self.dtype = dtype if floating and DTYPES[stored.dtype] != dtype else None
        kind = stored.dtype if self.dtype is None else dtype_name(self.dtype)
        self.outputs = (OutputTensor(name, kind, tuple(stored.shape)),)

    @property
    def sources(self) -> dict[str, Any]:
        """The tensor in its file."""
        return {"copy": source_of(self.stored), "as": self.outputs[0].dtype}

    def run(self, write: Write) -> None:
        """Copy it."""
        size = BITS[self.stored.dtype] // 8 or 1
        step = max(1, self.PIECE // size) * size
        for start in range(0, self.stored.nbytes, step):
            stop = min(start + step, self.stored.nbytes)
            piece = read_tensor(_bytes_of(self.stored, start, stop), self.name)
            if self.dtype is None:
                write(self.name, start, piece)
                continue
            floats = piece.view(DTYPES[self.stored.dtype])
            found = cast(floats, self.dtype, f"{self.stored.file}: {self.name}")
            write(self.name, start // size * self.dtype.itemsize, found)


def _bytes_of(stored: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Return some bytes of a stored tensor as a tensor of bytes."""
    return StoredTensor(
        stored.file, "U8", (stop - start,), stored.start + start, stop - start, stored.identity
    )


def source_of(stored: StoredTensor) -> list[Any]:
    """Return what tells a stored tensor from any other, and from itself after a change."""
    _, _, size, changed = stored.identity
    return [stored.file.name, size, changed, stored.start, stored.nbytes]


def sources_of_module(checkpoint: Checkpoint, name: str) -> list[list[Any]]:
    """Return the same of every tensor of a packed module."""
    stored = (checkpoint.tensors.get(f"{name}.{part}") for part in PARTS)
    return [source_of(one) for one in stored if one is not None]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a dtype.

    Example:
        >>> dtype_name(torch.bfloat16)
        'BF16'
    """
    return next(name for name, one in DTYPES.items() if one == dtype)


def cast(values: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Return floating values in a dtype that can hold them.

    Args:
        values: floating, any shape.
        dtype: to cast to.
        where: what they are, for the message.

    Raises:
        ValueError: a finite value is infinite in ``dtype``.

    Example:
        >>> cast(torch.tensor([1e5]), torch.float16, "w")
        Traceback (most recent call last):
        ValueError: w must be finite in float16, got 100000
    """
    if values.element_size() == 1:  # of 8 bits, of which torch asks little
        values = values.to(torch.float32)
    found = round_once(values, dtype)
    lost = found.isinf() & ~values.isinf()
    if lost.any():
        value = values[lost].flatten()[0].item()
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{where} must be finite in {name}, got {value:g}")
    return found
