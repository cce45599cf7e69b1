"""Few tokens on interleaved words: one reduction that loads each word once.

y[t, o] = sum over groups of s[o] * sum over words and nibbles of (q - z) * x

The layout (``layouts/interleaved.py``) splits x into eight planes, one for each nibble:
``x.view(tokens, 1, groups, 8, words)``. Codes minus zero-points are integers and therefore exact;
nothing is rounded before the sums in the accumulation dtype: ``weight_rounded=False,
base_rounded=False``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.interleaved import NIBBLES, InterleavedWeight
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["GEMV", "base"]

MOST_TOKENS = 4  # each token is unrolled


def base(x: Tensor, weight: InterleavedWeight) -> Tensor:
    """Return ``x W^T`` in the accumulation dtype."""
    sums = accumulation_dtype(x)
    tokens, groups = x.shape[0], weight.groups
    planes = weight.arrange(x).view(tokens, 1, groups, NIBBLES, weight.words_of_a_group)
    planes = planes.to(sums)
    words = weight.words.view(1, weight.out_features, groups, -1)
    zeros = weight.zeros(0, weight.out_features)
    offset = 8 if zeros is None else 8 + zeros[None, :, :, None]
    total = None
    for nibble in range(NIBBLES):
        codes = ((words >> (4 * nibble)) & 15) - offset
        term = codes.to(sums) * planes[:, :, :, nibble]
        total = term if total is None else total + term
    assert total is not None
    scaled = total * weight.scale.to(sums)[None, :, :, None]
    return scaled.sum((-1, -2))


def _limit(weight: InterleavedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    return f"{tokens} tokens, more than {MOST_TOKENS}" if tokens > MOST_TOKENS else None


GEMV = Formulation(
    name="gemv",
    base=base,
    layout=InterleavedWeight,
    weight_rounded=False,
    base_rounded=False,
    limit=_limit,
)
