"""Replace tensors of a checkpoint, or some of their rows, by those of an adapter.

Source: ``ModulesToSaveWrapper`` and ``TrainableTokensWrapper`` in ``peft/utils/other.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import Replacement
from int4_lora.integration.checkpoint.safetensors_files import DTYPES
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.conversion.deltas import Change, digest_of
from int4_lora.integration.conversion.dense_modules import MergedTensor
from int4_lora.integration.conversion.tasks import OutputTensor, Task, Write, cast, dtype_name

__all__ = ["AddedTensor", "Overwrite", "ReplacedTensor"]


class Overwrite(Change):
    """What replaces a weight, or some of its rows.

    Args:
        replacement: the values, ``[out_features, in_features]`` or ``[rows, in_features]``.
    """

    def __init__(self, replacement: Replacement) -> None:
        self.replacement = replacement
        self.values, self.rows = replacement.tensor, replacement.rows

    @property
    def source(self) -> list[Any]:
        """Digests of the values and of the indices of the rows, as JSON."""
        rows = None if self.rows is None else digest_of(self.rows)
        return ["overwrite", digest_of(self.values), rows]

    def apply_to(self, rows: Tensor, start: int) -> None:
        """Replace what lies in a block of rows of the weight, in place."""
        stop = start + rows.shape[0]
        if self.rows is None:
            rows.copy_(self.values[start:stop])
            return
        here = (self.rows >= start) & (self.rows < stop)
        rows[self.rows[here] - start] = self.values[here].to(rows.dtype)


class ReplacedTensor(Task):
    """A tensor of any shape that an adapter replaces as a whole.

    Args:
        name: the tensor's name.
        stored: the tensor in the source.
        dtype: the dtype of the result; None means the source's.
        values: the values that replace it, of the same shape.
    """

    def __init__(
        self, name: str, stored: StoredTensor, dtype: torch.dtype | None, values: Tensor
    ) -> None:
        self.name, self.values = name, values
        self.dtype = dtype or DTYPES[stored.dtype]
        self.outputs = (OutputTensor(name, dtype_name(self.dtype), tuple(values.shape)),)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The tensor of the same name in the source."""
        return (self.name,)

    @property
    def sources(self) -> dict[str, Any]:
        """A digest of the values, and the dtype of the result."""
        return {"replaced": digest_of(self.values), "as": self.outputs[0].dtype}

    def run(self, write: Write) -> None:
        """Round the values to the result's dtype."""
        where = f"{self.name}: the value that replaces it"
        write(self.name, 0, cast(self.values, self.dtype, where).contiguous())


class AddedTensor(MergedTensor):
    """A weight that the source does not have, made of another weight of the source."""

    @property
    def consumed(self) -> tuple[str, ...]:
        """Nothing: the other weight is in the result too."""
        return ()
