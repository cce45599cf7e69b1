"""Many tokens: dequantise a block of rows, multiply with the vendor GEMM, discard it.

y[:, rows] = RN_x( x W[rows]^T ),  block of rows by block of rows

Where x has the scales' dtype and products in that dtype are fast, W is rounded to it. Elsewhere
both factors are widened to the accumulation dtype, which holds every rounded weight exactly. The
GEMM rounds its result to the factors' dtype: ``base_rounded=True``. W is rounded by arithmetic that
torch.compile cannot omit (``rounding.py``): ``weight_rounded=True``.

Source: ``int4_lora.reference.dequantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled.formulations import int4pack_tiles
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.layouts.interleaved import InterleavedWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.products import has_products
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["TILES", "WORKSPACE_BYTES", "base"]

WORKSPACE_BYTES = {  # of one dequantised block of rows
    "cpu": 4 * 2**20,  # measured with 2 threads, 1 MiB of L2 and 32 MiB of L3
    "cuda": 64 * 2**20,  # a GEMM needs many outputs at a time; not measured
}
WORKSPACE_BYTES_OF_A_THREAD = 2 * 2**20  # for a thread's own blocks; measured with 2 threads


def base(x: Tensor, weight: PreparedWeight, workspace: int | None = None) -> Tensor:
    """Return ``x W^T`` in x's dtype or, where the factors are widened, the accumulation dtype.

    Args:
        x: ``[tokens, in_features]``.
        weight: returned by ``prepare``.
        workspace: the bytes of one dequantised block of rows; None for the device's default.
    """
    same = x.dtype == weight.scale_dtype and has_products(x)
    dtype = x.dtype if same else accumulation_dtype(x)
    x = x.to(dtype)
    if isinstance(weight, Int4PackWeight):
        return int4pack_tiles.base(x, weight, workspace or WORKSPACE_BYTES_OF_A_THREAD)
    if isinstance(weight, InterleavedWeight):
        x = weight.arrange(x)
    workspace = workspace or WORKSPACE_BYTES.get(x.device.type, WORKSPACE_BYTES["cuda"])
    rows = max(1, workspace // (dtype.itemsize * weight.in_features) // weight.tile)
    step = rows * weight.tile
    parts = []
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        parts.append(x @ weight.rows(start, stop, dtype).T)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


TILES = Formulation(
    name="tiles", base=base, layout=PreparedWeight, weight_rounded=True, base_rounded=True
)
