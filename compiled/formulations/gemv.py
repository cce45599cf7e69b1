"""Few tokens on interleaved words: one reduction, each word loaded once.

y[t, o] = sum over groups of s[o] * sum over words and nibbles of (q - z) * x

With planes of x for each of a word's eight nibbles, ``x.view(tokens, 1, groups, 8, words)``. The
codes are centred as integers, exactly; nothing is rounded before the sums in float32:
``weight_rounded=False, base_rounded=False``.

Source: ``int4_lora.compiled.layouts.interleaved`` for the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.interleaved import NIBBLES, PlanesWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["GEMV", "base"]

MOST_TOKENS = 4  # each is unrolled


def base(x: Tensor, weight: PlanesWeight) -> Tensor:
    """Return ``x W^T`` in the dtype of sums."""
    sums = accumulation_dtype(x)
    tokens, groups = x.shape[0], weight.groups
    planes = weight.arrange(x).view(tokens, 1, groups, NIBBLES, weight.words_of_a_group)
    planes = planes.to(sums)
    words = weight.words.view(1, weight.out_features, groups, -1)
    zeros = weight.zeros(0, weight.out_features)
    centre = 8 if zeros is None else 8 + zeros[None, :, :, None]
    total = None
    for nibble in range(NIBBLES):
        codes = ((words >> (4 * nibble)) & 15) - centre
        term = codes.to(sums) * planes[:, :, :, nibble]
        total = term if total is None else total + term
    assert total is not None
    scaled = total * weight.scale.to(sums)[None, :, :, None]
    return scaled.sum((-1, -2))


def _layer(
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    assert isinstance(weight, PlanesWeight)
    return add_terms(base(x, weight), x, slices, adapter_ids, bias)


def _refuses(weight: PreparedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    if not isinstance(weight, PlanesWeight):
        return "words that are not interleaved"
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens, more than {MOST_TOKENS}"
    return None


GEMV = Formulation(
    name="gemv", layer=_layer, weight_rounded=False, base_rounded=False, refuses=_refuses
)
