"""The checkpoint's own tensors as a layout: it holds everything that the others cannot."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference import PackedWeight, dequantize

__all__ = ["CheckpointWeight"]


@dataclass(frozen=True, eq=False)
class CheckpointWeight(PreparedWeight):
    """The checkpoint's own tensors.

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
