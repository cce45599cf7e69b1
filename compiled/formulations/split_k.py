"""2 to 64 tokens on a GPU: a product for each slice of in_features, to use all multiprocessors.

y[t, o] = RN_x( sum over slices s of  sum over columns k of s of  x[t, k] W[o, k],  + terms )

With few tokens a product has few blocks of outputs, and each block would wait for memory alone. So
in_features is cut into slices, and each block of outputs is computed once per slice. The sums of a
slice are float32 (``partial_products.py``); a second kernel adds the slices, the adapters and the
bias. W is decoded in the registers of the first kernel and rounded to the scale's dtype once, the
base is not rounded: ``weight_rounded=True, base_rounded=False``.

The layout is that of ``magic_gemv``, so that a GPU keeps one copy of a weight for one token and for
more. Slices consist of units: a unit is the eight nibbles of up to 16 consecutive words, of a part
of a group or of several whole groups. So a load of 128 columns reads 64 bytes of a row. All slices
have the same number of units. Units after the last count as 0: they are the last one, read again,
with 0 in place of x and of the scales. A mask would make each weight load a scale of its own.

Source: stream-K and split-K of CUTLASS (arXiv:2301.03598).
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled.formulations.formulation import Backend, Formulation
from int4_lora.compiled.formulations.kernel_launches import Launch, launching
from int4_lora.compiled.formulations.partial_products import (
    DOT_OPTIONS,
    partial_products,
    register_dot,
    unavailable,
)
from int4_lora.compiled.layouts.interleaved import NIBBLES, InterleavedWeight
from int4_lora.compiled.products import HALVES

__all__ = ["SPLIT_K", "base", "slicing"]

MOST_TOKENS = 64
UNIT_WORDS = 16  # the most consecutive words of a unit: what a group of 128 columns has
BLOCKS_OF_A_MULTIPROCESSOR = 3
MOST_SLICES = 32  # their sums are written out
MULTIPROCESSORS = 132  # of an H200, where the device is no GPU
FEW_TOKENS = 16  # the end of a bucket of graphs
FEW = Launch(outputs=64, words=128, warps=8, stages=2, tokens=FEW_TOKENS)
MANY = Launch(outputs=64, words=128, warps=8, stages=2, tokens=MOST_TOKENS)
UNMASKED_BATCH = 16  # the least products in a batch whose index Inductor does not mask
INTEGER = 0x4B000000  # the bits of 2^23 in float32: the last bits of 2^23 + q are those of q
OFFSET = 2.0**23 + 8


def base(x: Tensor, weight: InterleavedWeight) -> Tensor:
    """Return ``x W^T`` in float32."""
    tokens = x.shape[0]
    unit = unit_words(weight)
    slices, units = slicing(weight)
    columns = _extended_by_zeros(_columns(weight.arrange(x), weight, unit), slices * units)
    rows = _rows(weight, unit, slices * units).to(x.dtype)
    parts, length = output_parts(weight.out_features, slices), units * NIBBLES * unit
    columns = columns.reshape(tokens, slices, 1, length).permute(1, 2, 0, 3)
    rows = rows.reshape(parts, -1, slices, length).permute(2, 0, 3, 1)
    partial = partial_products(
        columns.expand(-1, parts, -1, -1).reshape(slices * parts, tokens, length),
        rows.reshape(slices * parts, length, -1),
    ).view(slices, parts, tokens, -1)
    total = partial[0]
    for index in range(1, slices):
        total = total + partial[index]
    return total.transpose(0, 1).reshape(tokens, -1)


def _columns(x: Tensor, weight: InterleavedWeight, unit: int) -> Tensor:
    """Return x by units: ``[tokens, units, columns of a unit]``, nibble by nibble."""
    spans, words = max(1, unit // weight.words_of_a_group), min(unit, weight.words_of_a_group)
    columns = x.view(x.shape[0], -1, spans, NIBBLES, weight.words_of_a_group // words, words)
    return columns.permute(0, 1, 4, 3, 2, 5).reshape(x.shape[0], -1, NIBBLES * unit)


def _rows(weight: InterleavedWeight, unit: int, units: int) -> Tensor:
    """Return W, unrounded in float32, by units: ``[out_features, units, columns of a unit]``.

    The product of a code and a scale of 16 bits is exact in float32.
    """
    rows, own = weight.out_features, weight.words.shape[1] // unit
    words = _extended(weight.words.view(rows, own, unit), units)
    scale = _extended_by_zeros(_by_word(weight.scale, own, unit), units)
    zeros = weight.zeros(0, rows)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[:, None]
    codes = (((words.unsqueeze(2) >> shifts) & 15) | INTEGER).view(torch.float32)
    offset: float | Tensor = OFFSET
    if zeros is not None:
        offset = _extended(_by_word(zeros, own, unit), units).unsqueeze(2).float() + OFFSET
    return ((codes - offset) * scale.unsqueeze(2).float()).flatten(2)


def _extended(values: Tensor, units: int) -> Tensor:
    """Return ``[n, own units, m]`` as ``[n, units, m]``, the last unit repeated.

    Compiled, only indices change.
    """
    own = values.shape[1]
    if units == own:
        return values
    place = torch.arange(units, dtype=torch.int32, device=values.device)
    return values.index_select(1, place.clamp(max=own - 1))


def _extended_by_zeros(values: Tensor, units: int) -> Tensor:
    """Return ``[n, own units, m]`` as ``[n, units, m]``; compiled, nothing is copied."""
    own = values.shape[1]
    if units == own:
        return values
    place = torch.arange(units, dtype=torch.int32, device=values.device)
    return torch.where((place < own)[:, None], _extended(values, units), 0)


def _by_word(values: Tensor, units: int, unit: int) -> Tensor:
    """Return values by group as values by word: ``[out_features, units, words of a unit]``."""
    rows, groups = values.shape
    each = values.unsqueeze(2).expand(-1, -1, units * unit // groups)
    return each.reshape(rows, units, unit)


def unit_words(weight: InterleavedWeight) -> int:
    """Return the words of a unit: ``UNIT_WORDS``, or as many below as divide those of a group."""
    words = weight.words_of_a_group
    if UNIT_WORDS % words == 0 and weight.words.shape[1] % UNIT_WORDS == 0:
        return UNIT_WORDS  # of several whole groups
    return max(size for size in range(1, UNIT_WORDS + 1) if words % size == 0)


def slicing(weight: InterleavedWeight) -> tuple[int, int]:
    """Return the number of slices, and of units in each: blocks for all multiprocessors, not more.

    Example:
        >>> from int4_lora.reference import quantize
        >>> narrow = quantize(torch.ones(8, 1024), group_size=128)
        >>> slicing(InterleavedWeight.from_packed(narrow))  # 8 units: a slice for each
        (8, 1)
    """
    unit = unit_words(weight)
    units = weight.words.shape[1] // unit
    step = max(1, FEW.words // (NIBBLES * unit))  # units that a block multiplies at a time
    steps = -(-units // step)
    blocks = -(-weight.out_features // FEW.outputs)
    wanted = -(-BLOCKS_OF_A_MULTIPROCESSOR * _multiprocessors(weight.device) // blocks)
    wanted = min(wanted, MOST_SLICES, steps)
    slices = wanted
    for several in range(wanted + 1, min(wanted * 3 // 2, MOST_SLICES, steps) + 1):
        if -steps % several < -steps % slices:  # fewer steps are masked
            slices = several
    each = -(-steps // slices)
    return -(-steps // each), each * step


def output_parts(out_features: int, slices: int) -> int:
    """Return the number of parts of the outputs that are products of their own, in a batch.

    With fewer than 16 products in the batch, Inductor masks every load by the product's index, and
    each weight then loads a scale of its own. One product has no index.

    Example:
        >>> output_parts(4096, 8), output_parts(11008, 4), output_parts(28672, 1)
        (2, 4, 1)
    """
    if slices == 1:
        return 1
    least = -(-UNMASKED_BATCH // slices)
    for parts in range(least, UNMASKED_BATCH):
        if out_features % (parts * FEW.outputs) == 0:
            return parts
    return 1


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _limit(weight: InterleavedWeight, dtype: torch.dtype, tokens: int) -> str | None:
    if dtype not in HALVES or dtype != weight.scale_dtype:
        return f"x in {dtype} and scales in {weight.scale_dtype}: both must have one 16-bit dtype"
    if not 2 <= tokens <= MOST_TOKENS:
        return f"{tokens} tokens, not 2 to {MOST_TOKENS}"
    return unavailable() if weight.device.type == "cuda" else None


def _backend(weight: InterleavedWeight, bucket: tuple[int, int]) -> Backend:
    _, units = slicing(weight)
    length = units * NIBBLES * unit_words(weight)
    launch = FEW if bucket[1] <= FEW_TOKENS else MANY
    if unavailable() is not None:  # on a CPU, where the operator is called
        return launching(launch, length)
    register_dot()
    return launching(launch, length, DOT_OPTIONS)


SPLIT_K = Formulation(
    name="split_k",
    base=base,
    layout=InterleavedWeight,
    weight_rounded=True,
    base_rounded=False,
    limit=_limit,
    devices=("cuda",),
    backend=_backend,
)
