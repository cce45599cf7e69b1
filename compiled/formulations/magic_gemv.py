"""Few tokens on a GPU: one reduction over interleaved words, decoded by magic numbers.

y[t, o] = sum over groups of s[o] * sum over words of
           ( -sum over nibbles of (c + z) x  +  sum over nibbles of (1 + q/c) * (c x) )

All outputs of a symmetric weight share the first inner sum. The two inner sums cancel: each is up
to 264 sum |x|, so the sums in float32 are off by up to ``CANCELLATION`` times sum |x| |s|, an error
that no rounding flag covers. Both sums must be finite: an x that is infinite, or 2^119 and more,
gives NaN. Nothing else is rounded: ``weight_rounded=False, base_rounded=False``.

The decoding is that of ``magic_numbers.py``, the layout that of ``layouts/interleaved.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.terms import UNROLLED_RANK
from int4_lora.compiled.formulations.formulation import Backend, Formulation
from int4_lora.compiled.formulations.kernel_launches import Launch, launching
from int4_lora.compiled.formulations.magic_numbers import CODE_SCALES, ORDER, decoded, decoded_rows
from int4_lora.compiled.formulations.whole_blocks import whole_blocks, words_of_whole_blocks
from int4_lora.compiled.layouts.interleaved import NIBBLES, InterleavedWeight

__all__ = ["MAGIC_GEMV", "base"]

CANCELLATION = 20 * 288 * 2.0**-24  # roundings of sums of up to 272 sum |x|, with a margin
MOST_TOKENS = 4  # the outputs of each token read the words again
ONE_TOKEN = Launch(outputs=4, words=256, warps=2, stages=1)
# more outputs per block, which share decoded zero-points
ONE_TOKEN_ASYMMETRIC = Launch(outputs=16, words=128, warps=1, stages=1)
SEVERAL_TOKENS = Launch(outputs=8, words=512, warps=4, stages=1)


def base(x: Tensor, weight: InterleavedWeight) -> Tensor:
    """Return ``x W^T`` in float32."""
    x, weight = whole_blocks(weight.arrange(x), weight, _launch(weight, x.shape[0]).words)
    tokens, groups = x.shape[0], weight.groups
    planes = x.view(tokens, 1, groups, NIBBLES, -1).float()
    by_nibble = [planes[:, :, :, nibble] for nibble in range(NIBBLES)]
    words = weight.words.view(1, weight.out_features, groups, -1)
    sums = {c: _sum_of(by_nibble, c) for c in (256.0, 16.0)}
    exponent = weight.exponents()[:1]
    total = sums[256.0] * -256.0 + sums[16.0] * -16.0
    if weight.zero_point is None:
        total = sums[256.0] * -264.0 + sums[16.0] * -24.0
    fractions = decoded(words, exponent)
    for nibble in range(NIBBLES) if weight.zero_point is None else ORDER:
        total = total + fractions[nibble] * (by_nibble[nibble] * CODE_SCALES[nibble])
    if weight.zero_point is not None:
        zeros = decoded_rows(weight.zero_point, weight.out_features, exponent)  # 1 + (8 + z) / 256
        total = total + (sums[256.0] + sums[16.0]) * (256.0 - 256.0 * zeros)[None, :, :, None]
    scaled = total * weight.scale.float()[None, :, :, None]
    return scaled.sum((-1, -2))


def _sum_of(by_nibble: Sequence[Tensor], code_scale: float) -> Tensor:
    """Return the sum of the four planes that multiply the nibbles of one c."""
    first, second, third, fourth = (
        plane for plane, c in zip(by_nibble, CODE_SCALES, strict=True) if c == code_scale
    )
    return first + second + third + fourth


def _limit(weight: InterleavedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"x in {dtype}, in which the cancellation of magic numbers shows"
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens, more than {MOST_TOKENS}"
    return None


def _backend(weight: InterleavedWeight, bucket: tuple[int, int]) -> Backend:
    launch = _launch(weight, bucket[1])
    return launching(launch, words_of_whole_blocks(weight, launch.words))


def _launch(weight: InterleavedWeight, tokens: int) -> Launch:
    if tokens > 1:
        return SEVERAL_TOKENS
    # with one group per row, ONE_TOKEN_ASYMMETRIC spills registers in float16
    if weight.zero_point is None or weight.groups == 1:
        return ONE_TOKEN
    words = ONE_TOKEN_ASYMMETRIC.words
    masked = words_of_whole_blocks(weight, words) % words != 0  # then it spills, too
    return ONE_TOKEN if masked else ONE_TOKEN_ASYMMETRIC


MAGIC_GEMV = Formulation(
    name="magic_gemv",
    base=base,
    layout=InterleavedWeight,
    weight_rounded=False,
    base_rounded=False,
    limit=_limit,
    devices=("cuda",),
    cancellation=CANCELLATION,
    most_rank=UNROLLED_RANK,
    backend=_backend,
)
