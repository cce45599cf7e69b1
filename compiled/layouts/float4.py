"""FP4 codes in another order, and a table that turns the byte of a scale into a number.

    w = (2 c) * t[s]

A row has blocks of 128 columns, 16 words each. Nibble j of word i of a block is the E2M1 code of
column 16 j + i. So the same nibble of consecutive words, which vector instructions process
together, multiplies consecutive columns of x, all with the scale of one group. Decoding a row needs
no shuffle.

Twice a code is an integer, which vector instructions get from a constant by a shift. ``t[s]`` is
half the value of the byte s over the global scale, in float32, correctly rounded or a neighbour of
that number: such that ``RN(2 c * t[s])`` is, for all sixteen codes, the exact weight rounded once
to bfloat16. So the two formats differ in the table and in the group size only. The
table has 256 entries, whatever the size of the weight.

Source: ``docs/format.md`` for codes and scales; the order is this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int4_lora.compiled.layouts.grouped import GroupedWeight
from int4_lora.compiled.layouts.layout import in_blocks
from int4_lora.compiled.products import kept
from int4_lora.compiled.rounding import rounded
from int4_lora.reference import Float4Weight, pack, unpack
from int4_lora.reference.float4 import E2M1, pack_float4, scale_values, unpack_float4
from int4_lora.reference.float4_weight import BaseWeight
from int4_lora.reference.rounding import round_once

__all__ = ["BlockedFloat4Weight", "refuses"]

NIBBLES = 8  # codes per word
WORDS = 16  # of a block: a vector of AVX-512
COLUMNS = NIBBLES * WORDS  # of a block
DOUBLED = 0xC8643210 - 2**32  # nibble m is twice the magnitude of the code m: 0 to 12


@dataclass(frozen=True, eq=False)
class BlockedFloat4Weight(GroupedWeight):
    """An FP4 weight whose words hold columns of eight groups of 16.

    Args:
        words: int32 ``[out_features, in_features / 8]``, in blocks of 16 words.
        scale: uint8 ``[out_features, groups]``, the bytes of the checkpoint's scales.
        shape: ``(out_features, in_features)``.
        group_size: 16 or 32, which tells the format.
        table: float32 ``[256]``, the number that multiplies the codes, by the byte of the scale.
        values: float64 ``[256]``, the exact value of each byte, which float64 sums take.
        global_scale: float32 ``[1]`` or None, as in the checkpoint.
    """

    words: Tensor
    scale: Tensor
    shape: tuple[int, int]
    group_size: int
    table: Tensor
    values: Tensor
    global_scale: Tensor | None

    order = None

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that dense weights are rounded to."""
        return torch.bfloat16

    @classmethod
    def from_float4(cls, weight: Float4Weight) -> BlockedFloat4Weight:
        """Lay out a weight for which ``refuses`` returns None."""
        table = _table(weight)
        assert table is not None, "refuses() was not asked"

        def blocked(start: int, stop: int) -> Tensor:
            codes = unpack_float4(weight.packed[start:stop])
            planes = codes.view(stop - start, -1, NIBBLES, WORDS)
            return pack(planes.transpose(2, 3).reshape(codes.shape).to(torch.int8) - 8)

        return cls(
            words=in_blocks(weight.out_features, blocked),
            scale=weight.scale.view(torch.uint8),
            shape=weight.shape,
            group_size=weight.group_size,
            table=table,
            values=_values(weight),
            global_scale=weight.global_scale,
        )

    @property
    def kind(self) -> type[BaseWeight]:
        """The class of the checkpoint's weight."""
        return Float4Weight

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        tensors = (self.words, self.scale, self.table, self.values, self.global_scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def tile(self) -> int:
        """Any row may be the first of a part."""
        return 1

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's bytes of rows ``start`` to ``stop``."""
        codes = unpack(self.words[start:stop], self.in_features) + 8
        words = codes.view(stop - start, -1, WORDS, NIBBLES)
        return pack_float4(words.transpose(2, 3).reshape(codes.shape).to(torch.uint8))

    def with_words(self, packed: Tensor) -> Float4Weight:
        """Return the checkpoint's other tensors, bit for bit, with these bytes."""
        is_nvfp4 = self.group_size == COLUMNS // NIBBLES
        scale = self.scale.view(torch.float8_e4m3fn) if is_nvfp4 else self.scale
        return Float4Weight(packed, scale, self.shape, self.global_scale)

    def part(self, start: int, stop: int) -> BlockedFloat4Weight:
        """Return rows as a weight that shares the memory of this weight."""
        return replace(
            self,
            words=self.words[start:stop],
            scale=self.scale[start:stop],
            shape=(stop - start, self.in_features),
        )

    def terms(
        self, x: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yield the scales of a group of each block, with the nibbles and columns of that group."""
        if torch.compiler.is_compiling() and x.dtype != dtype == torch.float32:
            x = kept(x)  # else each row would widen it anew
        planes = x.view(x.shape[0], 1, -1, NIBBLES, WORDS).to(dtype)
        words = self.words.view(1, self.out_features, -1, WORDS)
        nibbles = self.group_size // WORDS  # of a group
        scale = self._numbers(self.scale, dtype).view(1, self.out_features, -1, NIBBLES // nibbles)
        for group in range(NIBBLES // nibbles):
            pairs = [
                (_doubled_integers(words, nibble).to(dtype), planes[:, :, :, nibble])
                for nibble in range(group * nibbles, (group + 1) * nibbles)
            ]
            yield scale[:, :, :, group, None], pairs

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight, rounded once to bfloat16; in float64 not rounded."""
        words = self.words[start:stop].view(stop - start, -1, 1, WORDS)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.device)[:, None]
        codes = _doubled_floats(words >> shifts).view(stop - start, self.groups, self.group_size)
        if dtype == torch.float64:
            values = self.values[self.scale[start:stop].to(torch.int32)]
            dense = codes.to(dtype) * 0.5 * values[..., None]
            dense = dense if self.global_scale is None else dense / self.global_scale.to(dtype)
            return dense.view(stop - start, self.in_features)
        scale = self._numbers(self.scale[start:stop], torch.float32)
        dense = rounded(codes * scale[..., None], torch.bfloat16)
        return dense.to(dtype).view(stop - start, self.in_features)

    def _numbers(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers that multiply doubled codes, of bytes of scales."""
        if dtype != torch.float64:
            return self.table[scale.to(torch.int32)]
        numbers = self.values[scale.to(torch.int32)] * 0.5
        return numbers if self.global_scale is None else numbers / self.global_scale.to(dtype)


def _doubled_integers(words: Tensor, nibble: int) -> Tensor:
    """Return twice the values of the codes of one nibble: int32, in which -0 is 0.

    A product with -0 differs from that with 0 in the sign of zero alone, and a sum does not.
    """
    place = 4 * nibble - 2
    shift = (words >> place if place > 0 else words << -place) & 28  # 4 times three bits
    magnitude = torch.bitwise_right_shift(DOUBLED, shift) & 15
    negative = (words << (28 - 4 * nibble)) >> 31  # all bits of it, or none
    return (magnitude ^ negative) - negative


def _doubled_floats(nibbles: Tensor) -> Tensor:
    """Return twice the values of codes, which are the low four bits of int32 numbers.

    They are float32, in which -0 is -0.
    """
    magnitude = torch.bitwise_right_shift(DOUBLED, (nibbles & 7) << 2) & 15
    sign = 1 - ((nibbles >> 2) & 2)
    return magnitude.to(torch.float32) * sign.to(torch.float32)


def _values(weight: Float4Weight) -> Tensor:
    """Return the exact value of each byte as a scale of the weight's format: float64 ``[256]``."""
    every = torch.arange(256, device=weight.scale.device).to(torch.uint8)
    return scale_values(every.view(weight.scale.dtype))


def _table(weight: Float4Weight) -> Tensor | None:
    """Return the number that multiplies doubled codes, by the byte of the scale, or None."""
    values = _values(weight)
    over: Tensor | float = 1.0
    if weight.global_scale is not None:
        over = weight.global_scale.to(torch.float64)
    codes = torch.tensor(E2M1[:8], dtype=torch.float64, device=values.device)  # signs are alike
    wanted = round_once(codes * values[:, None] / over, torch.bfloat16)  # [256, 8]

    def is_right(table: Tensor) -> Tensor:
        products = ((2 * codes).to(torch.float32) * table[:, None]).to(torch.bfloat16)
        return ((products == wanted) | (products.isnan() & wanted.isnan())).all(dim=1)

    nearest = (0.5 * values / over).to(torch.float32)
    table = nearest
    for end in (torch.inf, -torch.inf):
        neighbour = torch.nextafter(nearest, torch.full_like(nearest, end))
        table = torch.where(is_right(table), table, neighbour)
    return table if bool(is_right(table).all()) else None


def refuses(weight: Float4Weight) -> str | None:
    """Return why a weight cannot be held in blocks of words, or None if it can."""
    if weight.packed.device.type != "cpu":
        return f"the device {weight.packed.device.type}"
    if weight.in_features % COLUMNS:
        return f"rows of {weight.in_features} columns, which fill no whole blocks of {COLUMNS}"
    if _table(weight) is None:
        assert weight.global_scale is not None, "E8M0 scales are powers of two"
        return f"no float32 numbers for a global scale of {weight.global_scale.item():g}"
    return None
