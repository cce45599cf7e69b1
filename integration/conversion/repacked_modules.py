"""Make the tensors that compressed-tensors stores for a module of GPTQ or AWQ.

Source: ``docs/format.md``.
"""

from __future__ import annotations

from typing import Any

import torch

from int4_lora.integration.checkpoint.compressed_tensors import tensors_of
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.conversion.row_blocks import row_blocks
from int4_lora.integration.conversion.tasks import (
    OutputTensor,
    Task,
    Write,
    sources_of_module,
    tensors_of_module,
)
from int4_lora.reference.packing import words_for

__all__ = ["RepackedModule"]

WHOLE = ("weight_shape", "weight_g_idx")  # the same for every block of rows


class RepackedModule(Task):
    """The pack-quantized tensors of a module in another layout.

    Args:
        checkpoint: an open checkpoint.
        name: the name of a module, whose values were checked.
        g_idx: whether to write ``weight_g_idx``, also where groups are in column order.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, *, g_idx: bool) -> None:
        self.checkpoint, self.name, self.g_idx = checkpoint, name, g_idx
        scheme = checkpoint.schemes[name]
        rows, columns = checkpoint.shape_of(name)
        scales = checkpoint.tensors[f"{name}.{checkpoint.layout(name).scale}"]
        groups = scales.shape[0]
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "weight_packed": ("I32", (rows, words_for(columns, scheme.bits))),
            "weight_scale": (scales.dtype, (rows, groups)),
            "weight_shape": ("I64", (2,)),
        }
        if not scheme.symmetric:
            shapes["weight_zero_point"] = ("I32", (words_for(rows, scheme.bits), groups))
        if g_idx:
            shapes["weight_g_idx"] = ("I32", (columns,))
        self.outputs = tuple(
            OutputTensor(f"{name}.{part}", dtype, shape) for part, (dtype, shape) in shapes.items()
        )

    @property
    def consumed(self) -> tuple[str, ...]:
        """The module's tensors."""
        return tensors_of_module(self.checkpoint, self.name)

    @property
    def sources(self) -> dict[str, Any]:
        """The module's tensors, and whether g_idx is written."""
        return {"repacked": sources_of_module(self.checkpoint, self.name), "g_idx": self.g_idx}

    def run(self, write: Write) -> None:
        """Repack the module, a block of rows at a time."""
        parts = {output.name.rpartition(".")[2]: output for output in self.outputs}
        rows, columns = self.checkpoint.shape_of(self.name)
        write(parts["weight_shape"].name, 0, torch.tensor([rows, columns]))
        for start, weight in row_blocks(self.checkpoint, self.name):
            tensors = tensors_of(weight)
            if start == 0 and self.g_idx:
                in_order = torch.arange(columns) // -(-columns // weight.scale.shape[1])
                g_idx = tensors.get("weight_g_idx", in_order.to(torch.int32))
                write(parts["weight_g_idx"].name, 0, g_idx)
            for part, output in parts.items():
                if part not in WHOLE:
                    first = start * output.shape[0] // rows
                    row_bytes = output.nbytes // output.shape[0]
                    write(output.name, first * row_bytes, tensors[part].contiguous())
