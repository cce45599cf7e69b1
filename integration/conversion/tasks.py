"""Tasks: each makes some tensors of a result and writes them piece by piece.

Source: the dtypes of https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES, bytes_of, read_tensor
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
    "tensors_of_module",
]

Write = Callable[[str, int, Tensor], None]  # (tensor's name, offset in bytes, piece)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the result.

    Args:
        name: the tensor's name.
        dtype: the safetensors name of the dtype, for example "BF16".
        shape: the tensor's shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class Task(ABC):
    """A step of a conversion, which makes tensors of the result that belong together."""

    outputs: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """The size of the task's tensors in bytes."""
        return sum(output.nbytes for output in self.outputs)

    @property
    @abstractmethod
    def consumed(self) -> tuple[str, ...]:
        """The names of the source's tensors that the task's tensors replace."""

    @property
    @abstractmethod
    def sources(self) -> dict[str, Any]:
        """The inputs of the task, as JSON: equal sources make equal bytes."""

    @abstractmethod
    def run(self, write: Write) -> dict[str, Any] | None:
        """Make the tensors, and write each of their bytes once.

        Args:
            write: takes pieces in any order.

        Returns:
            A report in JSON, or None.

        Raises:
            TypeError, ValueError: the source cannot be used; the message names the file, the tensor
                and the rule.
        """


class Copy(Task):
    """A copy of a tensor of the source, cast if the tensor is floating and ``dtype`` is given.

    Args:
        name: the tensor's name in the source and in the result.
        stored: the tensor in its file.
        dtype: the dtype of a floating tensor in the result; None keeps the stored dtype.
    """

    PIECE = 16 * 2**20  # bytes in memory at a time

    def __init__(self, name: str, stored: StoredTensor, dtype: torch.dtype | None = None) -> None:
        floating = stored.dtype in DTYPES and DTYPES[stored.dtype].is_floating_point
        self.name, self.stored = name, stored
        self.dtype = dtype if floating and DTYPES[stored.dtype] != dtype else None
        result_dtype = stored.dtype if self.dtype is None else dtype_name(self.dtype)
        self.outputs = (OutputTensor(name, result_dtype, tuple(stored.shape)),)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The tensor itself."""
        return (self.name,)

    @property
    def sources(self) -> dict[str, Any]:
        """The stored tensor, and the dtype of the result."""
        return {"copy": source_of(self.stored), "as": self.outputs[0].dtype}

    def run(self, write: Write) -> None:
        """Copy the tensor."""
        itemsize = BITS[self.stored.dtype] // 8 or 1
        step = max(1, self.PIECE // itemsize) * itemsize
        for start in range(0, self.stored.nbytes, step):
            stop = min(start + step, self.stored.nbytes)
            piece = read_tensor(bytes_of(self.stored, start, stop), self.name)
            if self.dtype is None:
                write(self.name, start, piece)
                continue
            values = piece.view(DTYPES[self.stored.dtype])
            narrow = cast(values, self.dtype, f"{self.stored.file}: {self.name}")
            write(self.name, start // itemsize * self.dtype.itemsize, narrow)


def source_of(stored: StoredTensor) -> list[Any]:
    """Return an identity of a stored tensor that changes when its file is written again."""
    _, _, size, changed = stored.identity
    return [stored.file.name, size, changed, stored.start, stored.nbytes]


def tensors_of_module(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """Return the full names of the tensors of a packed module."""
    return tuple(checkpoint.stored(name))


def sources_of_module(checkpoint: Checkpoint, name: str) -> list[list[Any]]:
    """Return ``source_of`` for every tensor of a packed module."""
    return [source_of(checkpoint.tensors[full]) for full in tensors_of_module(checkpoint, name)]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the safetensors name of a dtype.

    Example:
        >>> dtype_name(torch.bfloat16)
        'BF16'
    """
    return next(name for name, candidate in DTYPES.items() if candidate == dtype)


def cast(
    values: Tensor, dtype: torch.dtype, where: str, *, must_be_finite: Tensor | None = None
) -> Tensor:
    """Round floating values to a dtype once.

    Args:
        values: the values, of any shape.
        dtype: the dtype to round to.
        where: the name of the values in the error.
        must_be_finite: bool of the same shape, true for the values whose result must be finite;
            None means all finite values.

    Raises:
        ValueError: a value that must be finite is not.

    Example:
        >>> cast(torch.tensor([1e5]), torch.float16, "w")
        Traceback (most recent call last):
        ValueError: w must be finite in float16, got 100000
    """
    if values.element_size() == 1:  # torch implements few operations on 8-bit floats
        values = values.to(torch.float32)
    rounded = round_once(values, dtype)
    expected = values.isfinite() if must_be_finite is None else must_be_finite
    lost = expected & ~rounded.isfinite()
    if lost.any():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{where} must be finite in {name}, got {values[lost][0].item():g}")
    return rounded
