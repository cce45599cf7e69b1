"""Few tokens on a GPU: eight matrix products, one for each nibble's plane of x, in one kernel.

y = RN_x( sum over nibbles of x[:, plane] (s (c (1 + q/c) - (c + z)))^T )

With Inductor's ``triton.native_matmul`` the products are one loop of eight ``tl.dot``, each word
loaded once. Every factor is exact until s (q - z) is rounded to the dtype of x, which must be the
scale's: float32 holds s c, s (c + z) and their difference for scales of 16 bits below 2^119. The
products are summed in float32 and rounded once: ``weight_rounded=True, base_rounded=False``. That
holds as long as the kernel has no other reduction: Inductor keeps a product that it has to write
down in 16 bits, whatever ``out_dtype`` says. So only adapters whose sums are written out are taken.

Rows that fill no whole blocks of words repeat their last group (``whole_blocks``).

Source: ``int4_lora.compiled.formulations.magic_numbers``; the layout is that of ``PlanesWeight``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import UNROLLED_RANK, add_terms
from int4_lora.compiled.formulations.formulation import Backend, Formulation
from int4_lora.compiled.formulations.kernel_launches import (
    Launch,
    launching,
    native_matmul_is_missing,
)
from int4_lora.compiled.formulations.magic_numbers import CODE_SCALES, ORDER, decoded, decoded_rows
from int4_lora.compiled.formulations.whole_blocks import whole_blocks, words_of_whole_blocks
from int4_lora.compiled.layouts.interleaved import NIBBLES, PlanesWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.products import product

__all__ = ["PLANES", "base"]

FEW_TOKENS, MOST_TOKENS = 16, 64  # of the two buckets
LAUNCHES = {  # by the most tokens of a bucket, and whether there are no zero-points
    (FEW_TOKENS, True): Launch(outputs=32, tokens=16, words=64, warps=4, stages=2),
    (FEW_TOKENS, False): Launch(outputs=32, tokens=16, words=64, warps=4, stages=2),
    (MOST_TOKENS, True): Launch(outputs=64, tokens=64, words=32, warps=8, stages=2),
    (MOST_TOKENS, False): Launch(outputs=64, tokens=64, words=32, warps=8, stages=2),
}


def base(x: Tensor, weight: PlanesWeight) -> Tensor:
    """Return ``x W^T`` in float32."""
    tokens = x.shape[0]
    bucket = FEW_TOKENS if tokens <= FEW_TOKENS else MOST_TOKENS
    x, weight = whole_blocks(weight.arrange(x), weight, _launch(weight, bucket).words)
    planes = x.view(tokens, weight.groups, NIBBLES, weight.words_of_a_group)
    exponents = weight.exponents().unsqueeze(1)  # no scalar: that would depend on the tokens' mask
    scale = _for_each_word(weight.scale.float(), weight)
    factors = {c: scale * c for c in (256.0, 16.0)}
    shifts = {c: scale * (-c - 8.0) for c in factors}
    if weight.zero_point is not None:
        zeros = decoded_rows(weight.zero_point, weight.out_features, exponents)  # 1 + (8 + z) / 256
        shifts[256.0] = factors[256.0] * -_for_each_word(zeros, weight)
        shifts[16.0] = scale * 240.0 + shifts[256.0]
    total = None
    fractions = decoded(weight.words, exponents)
    for nibble in ORDER:
        c = CODE_SCALES[nibble]
        dense = (fractions[nibble] * factors[c] + shifts[c]).to(x.dtype)
        term = product(
            planes[:, :, nibble].reshape(tokens, weight.words.shape[1]), dense.T, torch.float32
        )
        total = term if total is None else total + term
    assert total is not None
    return total


def _launch(weight: PlanesWeight, most_tokens: int) -> Launch:
    symmetric, size = weight.zero_point is None, weight.words_of_a_group
    launch = LAUNCHES[most_tokens, symmetric]
    if most_tokens == FEW_TOKENS and symmetric and size == 8:
        return dataclasses.replace(launch, stages=3)  # 2 would spill
    if most_tokens == FEW_TOKENS and not symmetric and size not in (8, 16):
        return dataclasses.replace(launch, words=32)  # 64 would spill
    return launch


def _for_each_word(values: Tensor, weight: PlanesWeight) -> Tensor:
    """Return ``[out_features, groups]`` as ``[out_features, words of a row]``."""
    shape = (*values.shape, weight.words_of_a_group)
    return values.unsqueeze(2).expand(shape).flatten(1)


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
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x in {dtype}, which tensor cores do not multiply exactly"
    if dtype != weight.scale_dtype:
        return f"x in {dtype} with scales in {weight.scale_dtype}"
    if not 2 <= tokens <= MOST_TOKENS:
        return f"{tokens} tokens, not 2 to {MOST_TOKENS}"
    return native_matmul_is_missing()


def _backend(weight: PreparedWeight, bucket: tuple[int, int]) -> Backend:
    assert isinstance(weight, PlanesWeight)
    launch = _launch(weight, bucket[1])
    return launching(launch, words_of_whole_blocks(weight, launch.words))


PLANES = Formulation(
    name="planes",
    layer=_layer,
    weight_rounded=True,
    base_rounded=False,
    refuses=_refuses,
    devices=("cuda",),
    most_rank=UNROLLED_RANK,
    backend=_backend,
)
