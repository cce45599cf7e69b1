"""The checkpoint's own tensors as a layout: it holds every weight that the others cannot."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.rounding import scaled
from int4_lora.reference import PackedWeight
from int4_lora.reference.dequantization import centred_codes, scale_of_each_weight

__all__ = ["CheckpointWeight"]


@dataclass(frozen=True, eq=False)
class CheckpointWeight(PreparedWeight):
    """The checkpoint's own tensors.

    Args:
        weight: the tensors.
    """

    weight: PackedWeight

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns."""
        return self.weight.shape

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that dense weights are rounded to."""
        return self.weight.scale.dtype

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.weight.packed.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return self.weight.nbytes

    @property
    def tile(self) -> int:
        """All rows: blocks of rows may share scales, and zero-points share words."""
        return self.out_features

    def packed_weight(self) -> PackedWeight:
        """Return the checkpoint's tensors."""
        return self.weight

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of rows ``start`` to ``stop``."""
        return self.weight.packed[start:stop]

    def with_words(self, packed: Tensor) -> PackedWeight:
        """Return the checkpoint's other tensors with these words."""
        return dataclasses.replace(self.weight, packed=packed)

    def part(self, start: int, stop: int) -> CheckpointWeight:
        """Return all rows, as another object: ``tile`` allows no other part."""
        return CheckpointWeight(self.weight)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight."""
        codes, scale = centred_codes(self.weight), scale_of_each_weight(self.weight)
        return scaled(codes, scale).to(dtype)[start:stop]
