"""The checkpoint's own tensors as a layout: it holds every weight that the others cannot."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.rounding import rounded, scaled
from int4_lora.reference import Float4Weight
from int4_lora.reference.dequantization import centred_codes, scale_of_each_weight
from int4_lora.reference.float4 import unrounded_float4
from int4_lora.reference.float4_weight import BaseWeight, dense_dtype
from int4_lora.reference.rounding import round_to_odd

__all__ = ["CheckpointWeight"]


@dataclass(frozen=True, eq=False)
class CheckpointWeight(PreparedWeight):
    """The checkpoint's own tensors.

    Args:
        weight: the tensors.
    """

    weight: BaseWeight

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """Rows and columns."""
        return self.weight.shape

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that dense weights are rounded to."""
        return dense_dtype(self.weight)

    @property
    def kind(self) -> type[BaseWeight]:
        """The class of the checkpoint's weight."""
        return type(self.weight)

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

    def packed_weight(self) -> BaseWeight:
        """Return the checkpoint's tensors."""
        return self.weight

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words, of FP4 its bytes, of rows ``start`` to ``stop``."""
        return self.weight.packed[start:stop]

    def with_words(self, packed: Tensor) -> BaseWeight:
        """Return the checkpoint's other tensors with these words or bytes."""
        return dataclasses.replace(self.weight, packed=packed)

    def part(self, start: int, stop: int) -> CheckpointWeight:
        """Return all rows, as another object: ``tile`` allows no other part."""
        return CheckpointWeight(self.weight)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight; of FP4 not rounded if ``dtype`` is float64."""
        if isinstance(self.weight, Float4Weight):
            exact = unrounded_float4(self.weight)[start:stop]
            if dtype == torch.float64:
                return exact
            return rounded(round_to_odd(exact), torch.bfloat16).to(dtype)
        codes, scale = centred_codes(self.weight), scale_of_each_weight(self.weight)
        return scaled(codes, scale).to(dtype)[start:stop]
