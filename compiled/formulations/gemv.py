"""Few tokens: one reduction that loads each word or byte of the codes once.

y[t, o] = sum over groups of s[o] * sum over the group of (q - z) * x

The layout decodes: ``GroupedWeight.terms`` pairs codes with the columns of x that they multiply,
and with their scales. Codes minus zero-points are integers and therefore exact, as are codes of
FP4; nothing is rounded before the sums in the accumulation dtype: ``weight_rounded=False,
base_rounded=False``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from int4_lora.compiled.formulations.formulation import Formulation
from int4_lora.compiled.layouts.grouped import GroupedWeight
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["GEMV", "base"]

MOST_TOKENS = 4  # each token is unrolled


def base(x: Tensor, weight: GroupedWeight) -> Tensor:
    """Return ``x W^T`` in the accumulation dtype."""
    sums = [
        (functools.reduce(torch.add, [codes * columns for codes, columns in pairs]) * scale).sum(
            (-1, -2)
        )  # of [tokens, out, groups, columns]
        for scale, pairs in weight.terms(weight.arrange(x), accumulation_dtype(x))
    ]  # a sum for each part: Inductor would store the sum of many parts before it reduces them
    return functools.reduce(torch.add, sums)


def _limit(weight: GroupedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    return f"{tokens} tokens, more than {MOST_TOKENS}" if tokens > MOST_TOKENS else None


GEMV = Formulation(
    name="gemv",
    base=base,
    layout=GroupedWeight,
    weight_rounded=False,
    base_rounded=False,
    limit=_limit,
)
