"""What adapters do to weights of a checkpoint: the step, and the pairs that add to a weight.

delta = weight * scaling * B A

Source: arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import AdapterModule

__all__ = ["Change", "Delta", "digest_of"]


class Change(ABC):
    """A step that changes a weight; the steps of a weight are taken in order, in float64."""

    @property
    @abstractmethod
    def source(self) -> list[Any]:
        """The step as JSON: equal sources change a weight equally."""

    @abstractmethod
    def apply_to(self, rows: Tensor, start: int) -> None:
        """Change a block of rows of the weight, in place.

        Args:
            rows: float64 ``[any, in_features]``.
            start: the index of the block's first row in the whole weight.
        """


class Delta(Change):
    """What one adapter adds to one weight.

    Args:
        module: the adapter's pair of matrices for this weight.
        weight: the adapter's factor.
    """

    def __init__(self, module: AdapterModule, weight: float) -> None:
        self.a, self.b = module.a, module.b  # [rank, in_features], [out_features, rank]
        self.scaling = module.scaling * weight

    @property
    def source(self) -> list[Any]:
        """A digest of the matrices, and the factor, as JSON."""
        return [digest_of(self.a, self.b), self.scaling]

    def apply_to(self, rows: Tensor, start: int) -> None:
        """Add the delta to a block of rows of the weight, in place."""
        b = self.b[start : start + rows.shape[0]].to(torch.float64)
        rows += self.scaling * (b @ self.a.to(torch.float64))


def digest_of(*tensors: Tensor) -> str:
    """Return a digest of the dtypes and the bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tensor.dtype).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
