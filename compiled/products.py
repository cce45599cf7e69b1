"""Matrix products in the accumulation dtype, of factors in the dtype they are stored in.

Source: ``torch.mm`` and ``torch.bmm`` with ``out_dtype=torch.float32``, which exist on CUDA and not
on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HALVES", "batched_product", "has_products", "narrow_product", "product"]

HALVES = (torch.float16, torch.bfloat16)
ONEDNN = {  # functions that return whether oneDNN has products in a dtype on this CPU
    torch.float16: "_is_mkldnn_fp16_supported",
    torch.bfloat16: "_is_mkldnn_bf16_supported",
}


SLOW_ON_CPU = tuple(  # PyTorch's own products in these dtypes are 100 times slower
    dtype for dtype, name in ONEDNN.items() if not getattr(torch.ops.mkldnn, name, lambda: True)()
)


def has_products(x: Tensor) -> bool:
    """Return whether matrix products in the dtype of ``x`` are fast on its device."""
    return x.device.type != "cpu" or x.dtype not in SLOW_ON_CPU


def product(left: Tensor, right: Tensor, sums: torch.dtype) -> Tensor:
    """Return ``left @ right``, summed and returned in ``sums``.

    On CUDA, two factors of one 16-bit dtype are not widened if ``sums`` is float32.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``.
        sums: float32 or float64.
    """
    if _out_dtype_is_known(left, right, sums):
        return torch.mm(left, right, out_dtype=sums)
    return left.to(sums) @ right.to(sums)


def narrow_product(left: Tensor, right: Tensor, sums: torch.dtype) -> Tensor:
    """Return ``left @ right`` of factors of one dtype, which are not widened, summed in ``sums``.

    The result is in ``sums`` where the device has such products, else in the dtype of the factors.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``, in the dtype of ``left``.
        sums: float32 or float64.
    """
    if _out_dtype_is_known(left, right, sums):
        return torch.mm(left, right, out_dtype=sums)
    return left @ right


def batched_product(left: Tensor, right: Tensor, sums: torch.dtype) -> Tensor:
    """Return ``left @ right`` of each batch, as ``product`` does.

    Args:
        left: ``[batches, m, k]``.
        right: ``[batches, k, n]``.
        sums: float32 or float64.
    """
    if _out_dtype_is_known(left, right, sums):
        return torch.bmm(left, right, out_dtype=sums)
    return left.to(sums) @ right.to(sums)


def _out_dtype_is_known(left: Tensor, right: Tensor, sums: torch.dtype) -> bool:
    same = left.dtype == right.dtype and left.dtype in HALVES
    return left.is_cuda and same and sums == torch.float32
