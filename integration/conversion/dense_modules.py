"""Dense weights of quantised modules, with adapters merged in or without.

w = RN(W + sum over adapters of weight * scaling * B A), rounded once from float64; without
adapters w = W, as ``int4_lora.reference.dequantize`` defines it.

Source: arXiv:2106.09685, section 4.1; ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from int4_lora.integration.checkpoint.compressed_tensors import decompress_module, module_tensors
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES, read_rows
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.conversion.byte_tables import dense_rows
from int4_lora.integration.conversion.deltas import Delta
from int4_lora.integration.conversion.row_blocks import row_blocks
from int4_lora.integration.conversion.tasks import (
    OutputTensor,
    Task,
    Write,
    cast,
    dtype_name,
    source_of,
    sources_of_module,
)
from int4_lora.reference.rounding import round_once

__all__ = ["DenseModule", "MergedTensor", "OtherFormat"]

ROWS_BYTES = 8 * 2**20  # of a dense weight that are merged at a time, in float64


class DenseModule(Task):
    """The dense weight of a packed module.

    Args:
        checkpoint: an open checkpoint.
        name: one of its packed modules, whose headers were checked.
        dtype: of the result; None for the scale's.
        deltas: what adapters add.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        dtype: torch.dtype | None,
        deltas: Sequence[Delta] = (),
    ) -> None:
        self.checkpoint, self.name, self.deltas = checkpoint, name, tuple(deltas)
        self.dtype = dtype or DTYPES[checkpoint.tensors[f"{name}.weight_scale"].dtype]
        shape = checkpoint.shape_of(name)
        self.outputs = (OutputTensor(f"{name}.weight", dtype_name(self.dtype), shape),)

    @property
    def sources(self) -> dict[str, Any]:
        """The module's tensors, and the adapters."""
        return {
            "dense": sources_of_module(self.checkpoint, self.name),
            "as": self.outputs[0].dtype,
            "deltas": [one.source for one in self.deltas],
        }

    def run(self, write: Write) -> None:
        """Dequantise it, some rows at a time."""
        output = self.outputs[0]
        each = output.nbytes // output.shape[0]
        for start, weight in row_blocks(self.checkpoint, self.name):
            where = f"{self.checkpoint.path}: {self.name}"
            if not self.deltas:
                dense = dense_rows(weight)
                if dense.dtype != self.dtype:
                    dense = cast(dense, self.dtype, f"{where}: the weight")
            else:
                base = dense_rows(weight).to(torch.float64)
                dense = _merged(base, self.deltas, start, self.dtype, where)
            write(output.name, start * each, dense)


class MergedTensor(Task):
    """A weight that is dense in the source, with adapters merged in.

    Args:
        name: the weight's full name.
        stored: where it is.
        dtype: of the result; None for its own.
        deltas: what adapters add.
    """

    def __init__(
        self, name: str, stored: StoredTensor, dtype: torch.dtype | None, deltas: Sequence[Delta]
    ) -> None:
        self.name, self.stored, self.deltas = name, stored, tuple(deltas)
        self.dtype = dtype or DTYPES[stored.dtype]
        rows, columns = stored.shape
        self.outputs = (OutputTensor(name, dtype_name(self.dtype), (rows, columns)),)

    @property
    def sources(self) -> dict[str, Any]:
        """The tensor, and the adapters."""
        deltas = [one.source for one in self.deltas]
        return {"merged": source_of(self.stored), "as": self.outputs[0].dtype, "deltas": deltas}

    def run(self, write: Write) -> None:
        """Merge it, some rows at a time."""
        rows, columns = self.outputs[0].shape
        step = max(1, ROWS_BYTES // max(1, 8 * columns))
        for start in range(0, rows, step):
            found = read_rows(self.stored, self.name, start, min(start + step, rows))
            where = f"{self.stored.file}: {self.name}"
            dense = _merged(found.to(torch.float64), self.deltas, start, self.dtype, where)
            write(self.name, start * columns * self.dtype.itemsize, dense)


class OtherFormat(Task):
    """The dense weight of a module in another format, as compressed-tensors decompresses it.

    Args:
        checkpoint: an open checkpoint.
        name: the module.
        shape: of its weight.
        dtype: of the result.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.checkpoint, self.name, self.dtype = checkpoint, name, dtype
        self.outputs = (OutputTensor(f"{name}.weight", dtype_name(dtype), shape),)

    @property
    def sources(self) -> dict[str, Any]:
        """The module's tensors."""
        found = module_tensors(self.checkpoint, self.name)
        stored = [source_of(self.checkpoint.tensors[f"{self.name}.{part}"]) for part in found]
        return {"decompressed": stored, "as": self.outputs[0].dtype}

    def run(self, write: Write) -> None:
        """Decompress it, whole."""
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
    rows: torch.Tensor, deltas: Sequence[Delta], start: int, dtype: torch.dtype, where: str
) -> torch.Tensor:
    """Return some rows with what adapters add to them, rounded once.

    Args:
        rows: float64, written over.
        deltas: what adapters add.
        start: the first of the rows in the whole weight.
        dtype: of the result.
        where: what they are, for the message.

    Raises:
        ValueError: a weight that was finite is not.
    """
    finite = rows.isfinite()
    for delta in deltas:
        delta.add_to(rows, start)
    dense = round_once(rows, dtype)
    lost = finite & ~dense.isfinite()
    if lost.any():
        value, name = rows[lost][0].item(), str(dtype).removeprefix("torch.")
        raise ValueError(f"{where}: the merged weight must be finite in {name}, got {value:g}")
    return dense
