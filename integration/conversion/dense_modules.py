"""Make the dense weights of quantised modules, with or without merged adapters.

w = RN(W + sum over adapters of weight * scaling * B A), rounded once from float64; what replaces W
or rows of it comes first. Without adapters w = W, as ``int4_lora.reference.dequantize`` defines it.

Source: arXiv:2106.09685, section 4.1; ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.compressed_tensors import decompress_module, module_tensors
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES, read_rows
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.conversion.byte_tables import dense_rows
from int4_lora.integration.conversion.deltas import Change
from int4_lora.integration.conversion.row_blocks import row_blocks
from int4_lora.integration.conversion.tasks import (
    OutputTensor,
    Task,
    Write,
    cast,
    dtype_name,
    source_of,
    sources_of_module,
    tensors_of_module,
)

__all__ = ["DecompressedModule", "DenseModule", "MergedTensor"]

ROWS_BYTES = 8 * 2**20  # of float64 rows that are merged at a time


class DenseModule(Task):
    """The dense weight of a packed module.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a packed module, whose headers were checked.
        dtype: the dtype of the result; None means the scale's.
        deltas: the steps by which adapters change the weight, in order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        dtype: torch.dtype | None,
        deltas: Sequence[Change] = (),
    ) -> None:
        self.checkpoint, self.name, self.deltas = checkpoint, name, tuple(deltas)
        self.dtype = (
            dtype or DTYPES[checkpoint.tensors[f"{name}.{checkpoint.layout(name).scale}"].dtype]
        )
        shape = checkpoint.shape_of(name)
        self.outputs = (OutputTensor(f"{name}.weight", dtype_name(self.dtype), shape),)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The module's tensors."""
        return tensors_of_module(self.checkpoint, self.name)

    @property
    def sources(self) -> dict[str, Any]:
        """The module's tensors, the dtype of the result, and the adapters' steps."""
        return {
            "dense": sources_of_module(self.checkpoint, self.name),
            "as": self.outputs[0].dtype,
            "deltas": [delta.source for delta in self.deltas],
        }

    def run(self, write: Write) -> None:
        """Dequantise and merge the module, a block of rows at a time."""
        output = self.outputs[0]
        row_bytes = output.nbytes // output.shape[0]
        where = f"{self.checkpoint.path}: {self.name}"
        for start, weight in row_blocks(self.checkpoint, self.name):
            dense = dense_rows(weight)
            if self.deltas:
                dense = _merged(dense, self.deltas, start, self.dtype, where)
            elif dense.dtype != self.dtype:
                dense = cast(dense, self.dtype, f"{where}: the weight")
            write(output.name, start * row_bytes, dense)


class MergedTensor(Task):
    """A weight that is dense in the source, with adapters merged into it.

    Args:
        name: the weight's full name.
        stored: the weight in its file.
        dtype: the dtype of the result; None means the stored weight's.
        deltas: the steps by which adapters change the weight, in order.
    """

    def __init__(
        self, name: str, stored: StoredTensor, dtype: torch.dtype | None, deltas: Sequence[Change]
    ) -> None:
        self.name, self.stored, self.deltas = name, stored, tuple(deltas)
        self.dtype = dtype or DTYPES[stored.dtype]
        rows, columns = stored.shape
        self.outputs = (OutputTensor(name, dtype_name(self.dtype), (rows, columns)),)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The weight itself."""
        return (self.name,)

    @property
    def sources(self) -> dict[str, Any]:
        """The stored weight, the dtype of the result, and the adapters' steps."""
        deltas = [delta.source for delta in self.deltas]
        return {"merged": source_of(self.stored), "as": self.outputs[0].dtype, "deltas": deltas}

    def run(self, write: Write) -> None:
        """Merge the weight, a block of rows at a time."""
        rows, columns = self.outputs[0].shape
        step = max(1, ROWS_BYTES // max(1, 8 * columns))
        where = f"{self.stored.file}: {self.name}"
        for start in range(0, rows, step):
            base = read_rows(self.stored, self.name, start, min(start + step, rows))
            dense = _merged(base, self.deltas, start, self.dtype, where)
            write(self.name, start * columns * self.dtype.itemsize, dense)


class DecompressedModule(Task):
    """The dense weight of a module in another format, decompressed by compressed-tensors.

    Args:
        checkpoint: an open checkpoint.
        name: the module's name.
        shape: the shape of the dense weight.
        dtype: the dtype of the result.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.checkpoint, self.name, self.dtype = checkpoint, name, dtype
        self.outputs = (OutputTensor(f"{name}.weight", dtype_name(dtype), shape),)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The module's tensors."""
        parts = module_tensors(self.checkpoint, self.name)
        return tuple(f"{self.name}.{part}" for part in parts)

    @property
    def sources(self) -> dict[str, Any]:
        """The module's tensors, and the dtype of the result."""
        stored = [source_of(self.checkpoint.tensors[full]) for full in self.consumed]
        return {"decompressed": stored, "as": self.outputs[0].dtype}

    def run(self, write: Write) -> None:
        """Decompress the whole module at once."""
        where = f"{self.checkpoint.path}: {self.name}"
        dense = decompress_module(self.checkpoint, self.name)
        output = self.outputs[0]
        if tuple(dense.shape) != output.shape:
            raise ValueError(
                f"{where}: the weight must be {list(output.shape)} by its tensors, "
                f"compressed-tensors gives {list(dense.shape)}"
            )
        write(output.name, 0, cast(dense, self.dtype, f"{where}: the weight").contiguous())


def _merged(
    base: Tensor, deltas: Sequence[Change], start: int, dtype: torch.dtype, where: str
) -> Tensor:
    """Merge adapters into rows of a base weight; return them rounded once.

    Args:
        base: the rows.
        deltas: the steps by which adapters change the weight, in order.
        start: the index of the first of these rows in the whole weight.
        dtype: the dtype of the result.
        where: the name of the module in the error.

    Raises:
        ValueError: a weight that is finite in the base is not finite in the result.
    """
    rows = base.to(torch.float64, copy=True)
    for delta in deltas:
        delta.apply_to(rows, start)
    name = f"{where}: the merged weight"
    return cast(rows, dtype, name, must_be_finite=base.isfinite())
