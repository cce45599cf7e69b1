"""Matrix products in the dtype of sums, of factors as they are stored.

Source: ``torch.mm(..., out_dtype=torch.float32)``, which CUDA has and a CPU has not.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["product"]

HALVES = (torch.float16, torch.bfloat16)


def product(left: Tensor, right: Tensor, sums: torch.dtype) -> Tensor:
    """Return ``left @ right`` summed and kept in ``sums``; 16-bit factors are not widened on CUDA.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``.
        sums: float32 or float64.
    """
    same = left.dtype == right.dtype and left.dtype in HALVES
    if left.is_cuda and same and sums == torch.float32:
        return torch.mm(left, right, out_dtype=sums)
    return left.to(sums) @ right.to(sums)
