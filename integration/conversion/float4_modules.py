"""Make the dense weights of FP4 modules, with or without merged adapters.

w = RN(c * s / S), or RN(c * s / S + sum over adapters of weight * scaling * B A): rounded once.

Source: ``docs/format.md``, "FP4"; arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from int4_lora.integration.checkpoint.float4_assembly import assemble_float4
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.safetensors_files import read_rows, read_tensor
from int4_lora.integration.conversion.deltas import Change
from int4_lora.integration.conversion.dense_modules import DenseModule
from int4_lora.integration.conversion.tasks import Write, cast
from int4_lora.reference import Float4Weight, dequantize

__all__ = ["Float4Module", "float4_blocks"]

WEIGHTS = 2**20  # of a block


def float4_blocks(checkpoint: Checkpoint, name: str) -> Iterator[tuple[int, Float4Weight]]:
    """Yield blocks of rows of an FP4 weight, each as a ``Float4Weight``.

    Args:
        checkpoint: an open checkpoint.
        name: the name of an FP4 module, whose headers were checked.

    Yields:
        The index of a block's first row, and the block.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other, or a file changed.
    """
    rows, columns = checkpoint.shape_of(name)
    count = max(1, WEIGHTS // columns)
    for start in range(0, rows, count):
        tensors = {}
        for full in checkpoint.stored(name):
            stored, part = checkpoint.tensors[full], full.rpartition(".")[2]
            whole = part == "weight_global_scale"
            tensors[part] = (
                read_tensor(stored, full)
                if whole
                else read_rows(stored, full, start, min(start + count, rows))
            )
        yield start, assemble_float4(checkpoint.schemes[name], tensors)


class Float4Module(DenseModule):
    """The dense weight of an FP4 module.

    Args:
        checkpoint: an open checkpoint.
        name: the name of an FP4 module, whose headers were checked.
        dtype: the dtype of the result; None means bfloat16.
        deltas: the steps by which adapters change the weight, in order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        dtype: torch.dtype | None,
        deltas: Sequence[Change] = (),
    ) -> None:
        super().__init__(checkpoint, name, dtype or torch.bfloat16, deltas)

    def run(self, write: Write) -> None:
        """Dequantise and merge the module, a block of rows at a time."""
        output = self.outputs[0]
        row_bytes = output.nbytes // output.shape[0]
        where = f"{self.checkpoint.path}: {self.name}"
        for start, weight in float4_blocks(self.checkpoint, self.name):
            exact = dequantize(weight, torch.float64)
            finite = exact.isfinite()
            for delta in self.deltas:
                delta.apply_to(exact, start)
            merged = "merged " if self.deltas else ""
            dense = cast(exact, self.dtype, f"{where}: the {merged}weight", must_be_finite=finite)
            write(output.name, start * row_bytes, dense)
