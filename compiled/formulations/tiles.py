"""Many tokens: some rows of W are dequantised, multiplied by the library, and forgotten.

y[:, rows] = RN_x( x W[rows]^T ),  tile of rows by tile of rows

Where x has the scale's dtype, and the library has products of it, the product is one of that dtype
and W is rounded as declared; else both are widened to the dtype of sums, which holds every weight
exactly as rounded. The library
rounds its result to x's dtype: ``weight_rounded=True, base_rounded=True``. torch.compile may leave
the rounding of W out where it fuses: ``weight_rounded=False`` is what is declared.

Source: ``int4_lora.reference.dequantize``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.formulations import int4pack_tiles
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.int4pack import Int4PackWeight
from int4_lora.compiled.layouts.interleaved import PlanesWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.products import has_products
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["TILES", "WORKSPACE_BYTES", "base"]

WORKSPACE_BYTES = {  # of one tile
    "cpu": 4 * 2**20,  # measured with 2 threads, 1 MiB of L2 and 32 MiB of L3
    "cuda": 64 * 2**20,  # a library's product needs many outputs at a time; not measured
}
WORKSPACE_BYTES_OF_A_THREAD = 2 * 2**20  # where threads have parts of their own; measured with 2


def base(x: Tensor, weight: PreparedWeight) -> Tensor:
    """Return ``x W^T`` in x's dtype, or in that of sums where x has not the scale's dtype."""
    same = x.dtype == weight.scale_dtype and has_products(x)
    dtype = x.dtype if same else accumulation_dtype(x)
    x = x.to(dtype)
    if isinstance(weight, Int4PackWeight):
        return int4pack_tiles.base(x, weight, WORKSPACE_BYTES_OF_A_THREAD)
    if isinstance(weight, PlanesWeight):
        x = weight.arrange(x)
    workspace = WORKSPACE_BYTES.get(x.device.type, WORKSPACE_BYTES["cuda"])
    rows = max(1, workspace // (dtype.itemsize * weight.in_features) // weight.tile)
    step = rows * weight.tile
    parts = []
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        parts.append(x @ weight.rows(start, stop, dtype).T)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _layer(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return add_terms(base(x, weight), x, slices, adapter_ids, bias)


def _refuses(weight: PreparedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    return None


TILES = Formulation(
    name="tiles", layer=_layer, weight_rounded=False, base_rounded=True, refuses=_refuses
)
