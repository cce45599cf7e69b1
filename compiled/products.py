"""Matrix products in the accumulation dtype, of factors in the dtype they are stored in.

Source: ``torch.mm`` and ``torch.bmm`` with ``out_dtype=torch.float32``, which exist on CUDA and not
on a CPU.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from int4_lora.reference.lora import accumulation_dtype

__all__ = [
    "BATCHED_TOKENS",
    "HALVES",
    "SLOW_ON_CPU",
    "batched_product",
    "factor_dtype",
    "first_of_pairs",
    "kept",
    "narrow_product",
    "product",
]

HALVES = (torch.float16, torch.bfloat16)
ONEDNN = {  # functions that return whether oneDNN has products in a dtype on this CPU
    torch.float16: "_is_mkldnn_fp16_supported",
    torch.bfloat16: "_is_mkldnn_bf16_supported",
}
BATCHED_TOKENS = 95  # the most for which a CPU's 16-bit products are batches, one for each thread
X86 = ("x86_64", "AMD64")
BFLOAT16_ON_X86 = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # in torch.cpu


def _emulates_bfloat16() -> bool:
    """Return whether this CPU has no instructions for products of bfloat16, as far as torch tells.

    oneDNN then converts the factors at each use: its products take 4 times those of float32.
    """
    tests = [getattr(torch.cpu, name, None) for name in BFLOAT16_ON_X86]
    return platform.machine() in X86 and not any(test is None or test() for test in tests)


def _slow_on_cpu() -> tuple[torch.dtype, ...]:
    """Return the dtypes whose products are slower on this CPU than those of float32."""
    lacking = [  # PyTorch's own products in these are 100 times slower
        dtype
        for dtype, name in ONEDNN.items()
        if not getattr(torch.ops.mkldnn, name, lambda: True)()
    ]
    return (*lacking, *([torch.bfloat16] if _emulates_bfloat16() else []))


SLOW_ON_CPU = _slow_on_cpu()


def factor_dtype(x: Tensor, scale_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which x and a dense weight are multiplied.

    It is that of x where the scales have it as well and products in it are fast on the device.
    Otherwise it is the accumulation dtype, which holds x and every rounded weight exactly.
    """
    slow = x.device.type == "cpu" and x.dtype in SLOW_ON_CPU
    return x.dtype if x.dtype == scale_dtype and not slow else accumulation_dtype(x)


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


def first_of_pairs(pairs: Tensor) -> Tensor:
    """Return the first number of each pair, for a graph that computes them once.

    It is the product with (1, 0): exact, except that -0 becomes 0. Inductor keeps a product in
    memory. Everything else it would compute anew at each use, with vectors as wide as 16-bit
    operands make them.

    Args:
        pairs: float32 ``[n, 2]``; the second numbers are finite.

    Returns:
        float32 ``[n, 1]``.
    """
    return pairs @ torch.tensor([[1.0], [0.0]], device=pairs.device)


def kept(values: Tensor) -> Tensor:
    """Return numbers in float32, which a graph computes once and keeps in memory.

    Args:
        values: finite or not, of any dtype and shape.
    """
    values = values.to(torch.float32)
    pairs = torch.stack([values, torch.zeros_like(values)], dim=-1)
    return first_of_pairs(pairs.reshape(-1, 2)).view(values.shape)


def _out_dtype_is_known(left: Tensor, right: Tensor, sums: torch.dtype) -> bool:
    same = left.dtype == right.dtype and left.dtype in HALVES
    return left.is_cuda and same and sums == torch.float32
