"""Merge adapters into packed modules, and quantise the modules again.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.assembly import stored_parts
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.conversion.byte_tables import dense_rows
from int4_lora.integration.conversion.deltas import Change
from int4_lora.integration.conversion.row_blocks import row_blocks, rows_of
from int4_lora.integration.conversion.scale_search import Requantized, requantize
from int4_lora.integration.conversion.tasks import OutputTensor, Task, Write, sources_of_module

__all__ = ["RequantizedModule", "replaced_tensors"]

REPLACED = ("weight_scale", "weight_zero_point", "weight_global_scale")  # g_idx, shape are copied


def replaced_tensors(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """Return the full names of the tensors of a module that merging changes.

    Args:
        checkpoint: an open checkpoint of compressed-tensors.
        name: the name of a packed module.
    """
    full = (f"{name}.{part}" for part in (checkpoint.layout(name).codes, *REPLACED))
    return tuple(tensor for tensor in full if tensor in checkpoint.tensors)


class RequantizedModule(Task):
    """The tensors of a packed module with adapters merged into it.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a packed module, whose headers were checked.
        deltas: the steps by which adapters change the weight, in order.
        search: whether to search for scales, or to use min-max scales.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, deltas: Sequence[Change], *, search: bool
    ) -> None:
        self.checkpoint, self.name, self.search = checkpoint, name, search
        self.deltas = tuple(deltas)
        stored = {full: checkpoint.tensors[full] for full in replaced_tensors(checkpoint, name)}
        self.outputs = tuple(
            OutputTensor(full, tensor.dtype, tuple(tensor.shape)) for full, tensor in stored.items()
        )

    @property
    def consumed(self) -> tuple[str, ...]:
        """The tensors of the same names in the source."""
        return tuple(output.name for output in self.outputs)

    @property
    def sources(self) -> dict[str, Any]:
        """The module's tensors, the choice of scales, and the adapters."""
        return {
            "requantized": sources_of_module(self.checkpoint, self.name),
            "search": self.search,
            "deltas": [delta.source for delta in self.deltas],
        }

    def run(self, write: Write) -> dict[str, Any]:
        """Merge and requantise the module, a block of rows at a time; return the error."""
        error = minmax = norm = delta_norm = kept = largest = 0.0
        self._begin(write)
        for start, weight in self._blocks():
            base, exact = self._merged(start, weight)
            try:
                block = self._requantized(exact, weight)
            except ValueError as refused:
                raise ValueError(f"{self.checkpoint.path}: {self.name}: {refused}") from refused
            self._write(write, start, block.weight)
            error += block.squared_error
            minmax += block.minmax_squared_error
            norm += block.squared_norm
            added, changed = exact - base, self._dense(block.weight) - base
            delta_norm += float(added.square().sum())
            kept += float((changed * added).sum())
            largest = max(largest, block.max_error)
        return {
            "module": self.name,
            "squared_error": error,
            "minmax_squared_error": minmax,
            "squared_norm": norm,
            "squared_delta": delta_norm,
            "kept_delta": kept,
            "max_error": largest,
        }

    def _begin(self, write: Write) -> None:
        """Write what is known before the first block of rows: nothing."""

    def _blocks(self) -> Iterator[tuple[int, Any]]:
        """Yield the first row of each block of rows, and the block as a weight."""
        whole = self.checkpoint.schemes[self.name].strategy == "tensor"  # all rows share one scale
        return row_blocks(self.checkpoint, self.name, whole=whole)

    def _dense(self, weight: Any) -> Tensor:
        """Return the dense rows of a block, float64."""
        return dense_rows(weight).to(torch.float64)

    def _merged(self, start: int, weight: Any) -> tuple[Tensor, Tensor]:
        """Return the dense rows of a block, and these rows after all steps of the adapters."""
        base = self._dense(weight)
        exact = base.clone()
        for delta in self.deltas:
            delta.apply_to(exact, start)
        return base, exact

    def _requantized(self, exact: Tensor, weight: Any) -> Requantized:
        """Quantise the merged rows of a block as the block is quantised."""
        return requantize(exact, weight, search=self.search)

    def _write(self, write: Write, start: int, block: Any) -> None:
        """Write the rows of each tensor for one block of rows of the weight."""
        values = stored_parts(self.checkpoint.schemes[self.name], block)
        shared = rows_of(self.checkpoint, self.name)
        for output in self.outputs:
            part = output.name.rpartition(".")[2]
            rows = values[part]
            first = start // shared[part]
            count = output.shape[0] if output.shape else 1  # one scale may have the shape []
            write(output.name, first * (output.nbytes // count), rows.contiguous())
