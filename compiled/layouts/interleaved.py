"""The checkpoint's words with the codes of each group in another order: as many bytes, interleaved.

A group of g columns has g/8 words. In a checkpoint, nibble j of word w is column 8 w + j of the
group; here it is column j g/8 + w. So the same nibble of consecutive words, which vector
instructions process together, multiplies consecutive columns of x, and decoding a row needs no
shuffle. For each group, x splits into eight contiguous planes, one for each nibble.

A word of a checkpoint holds the zero-points of eight rows; here two 16-bit numbers hold them, the
first number those of the first four rows. A GPU kernel then loads each number once for a group;
Triton would copy 32-bit words through shared memory, one copy for every word of the group.

With a ``g_idx`` of balanced groups, columns are first sorted by group, and x is gathered to match.

Source: ``docs/format.md`` for the codes; the order is this project's own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int4_lora.compiled.layouts.grouped import GroupedWeight, uneven_groups
from int4_lora.compiled.layouts.layout import in_blocks
from int4_lora.compiled.products import kept
from int4_lora.compiled.rounding import scaled
from int4_lora.reference import PackedWeight, pack, unpack

__all__ = ["EXPONENT_OF_ONE", "NIBBLES", "InterleavedWeight", "refuses"]

EXPONENT_OF_ONE = 0x3F800000  # the exponent bits of 1.0 in float32
NIBBLES = 8  # codes per word
ZEROS = 4  # zero-points per 16-bit number
LANES = 16  # words in a vector of AVX-512


@dataclass(frozen=True, eq=False)
class InterleavedWeight(GroupedWeight):
    """An interleaved INT4 weight with one scale per row or per group of columns.

    Args:
        words: int32 ``[out_features, in_features / 8]``, interleaved within each group.
        scale: ``[out_features, groups]``, as in the checkpoint.
        shape: ``(out_features, in_features)``.
        zero_point: int16 ``[2 ceil(out_features / 8), groups]``, four rows in each number, or None.
        g_idx: as in the checkpoint, or None.
        order: int32 ``[in_features]``, the column of x that each column here multiplies, or None if
            both are in the same order.
        group_size: as in the checkpoint's ``PackedWeight``.
        exponent: on a GPU int32 ``[out_features]``, all ``EXPONENT_OF_ONE``; else None.
    """

    words: Tensor
    scale: Tensor
    shape: tuple[int, int]
    zero_point: Tensor | None
    g_idx: Tensor | None
    order: Tensor | None
    group_size: int | tuple[int, int] | None
    exponent: Tensor | None = None

    @classmethod
    def from_packed(cls, weight: PackedWeight) -> InterleavedWeight:
        """Interleave a weight for which ``refuses`` returns None."""
        order = cls.order_of(weight)
        groups, device = weight.scale.shape[1], weight.packed.device

        def interleaved(start: int, stop: int) -> Tensor:
            codes = unpack(weight.packed[start:stop], weight.in_features)
            codes = codes if order is None else codes[:, order]
            planes = codes.view(stop - start, groups, NIBBLES, -1)  # [out, group, j, w]
            return pack(planes.transpose(2, 3).reshape(codes.shape))

        return cls(
            words=in_blocks(weight.out_features, interleaved),
            scale=weight.scale,
            shape=weight.shape,
            zero_point=None if weight.zero_point is None else _split(weight.zero_point),
            g_idx=weight.g_idx,
            order=None if order is None else order.to(torch.int32),
            group_size=weight.group_size,
            exponent=_exponents(weight.out_features, device) if device.type == "cuda" else None,
        )

    @property
    def _on_cpu(self) -> bool:
        """Whether Inductor's code for CPUs reads this weight, on a machine whose bytes it knows."""
        return self.device.type == "cpu" and sys.byteorder == "little"

    @property
    def _fills_vectors(self) -> bool:
        """Whether a group's words fill a CPU's vectors; fewer are decoded faster without."""
        return self._on_cpu and self.words_of_a_group >= LANES

    @property
    def words_of_a_group(self) -> int:
        """The words that a group of a row fills."""
        return self.words.shape[1] // self.groups

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        tensors = (self.words, self.scale, self.zero_point, self.g_idx, self.order, self.exponent)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def tile(self) -> int:
        """The rows whose zero-points fill a word of the checkpoint."""
        return NIBBLES

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of rows ``start`` to ``stop``."""
        codes = unpack(self.words[start:stop], self.in_features)
        words = codes.view(stop - start, self.groups, -1, NIBBLES)
        codes = words.transpose(2, 3).reshape(codes.shape)
        return pack(codes if self.order is None else codes[:, torch.argsort(self.order)])

    def with_words(self, packed: Tensor) -> PackedWeight:
        """Return the checkpoint's other tensors, bit for bit, with these words."""
        return PackedWeight(
            packed=packed,
            scale=self.scale,
            shape=self.shape,
            zero_point=None if self.zero_point is None else _joined(self.zero_point),
            g_idx=self.g_idx,
            group_size=self.group_size,
        )

    def zeros(self, start: int, stop: int, *, in_bytes: bool = False) -> Tensor | None:
        """Return the zero-points of rows: int32 ``[stop - start, groups]``, or None.

        Args:
            start: the first row.
            stop: the row after the last.
            in_bytes: whether to load bytes. Inductor does not vectorise loops for a CPU that load
                16-bit integers.
        """
        if self.zero_point is None:
            return None
        row = torch.arange(start, stop, dtype=torch.int32, device=self.device)
        if in_bytes:
            pairs = self.zero_point.view(torch.uint8).view(-1, self.groups, ZEROS // 2)
            numbers = pairs[row // ZEROS, :, row % ZEROS // 2].to(torch.int32)
            return ((numbers >> (4 * (row % 2))[:, None]) & 15) - 8
        numbers = self.zero_point.index_select(0, row // ZEROS).to(torch.int32)
        return ((numbers >> (4 * (row % ZEROS))[:, None]) & 15) - 8

    def terms(
        self, x: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yield all scales, with each nibble's ``q - z`` and the plane of x that it multiplies."""
        planes = x.view(x.shape[0], 1, self.groups, NIBBLES, self.words_of_a_group).to(dtype)
        words = self.words.view(1, self.out_features, self.groups, -1)
        zeros = self.zeros(0, self.out_features, in_bytes=self._on_cpu)
        offset = 8 if zeros is None else 8 + zeros[None, :, :, None]
        pairs = []
        for nibble in range(NIBBLES):
            codes = ((words >> (4 * nibble)) & 15) - offset
            pairs.append((codes.to(dtype), planes[:, :, :, nibble]))
        yield self.scale_of_sums(dtype), pairs

    def exponents(self) -> Tensor:
        """Return int32 ``[out_features]``, all ``EXPONENT_OF_ONE``."""
        if self.exponent is not None:
            return self.exponent
        return _exponents(self.out_features, self.device)

    def part(self, start: int, stop: int) -> InterleavedWeight:
        """Return rows as a weight that shares the memory of this weight."""
        zeros = self.zero_point
        return replace(
            self,
            words=self.words[start:stop],
            scale=self.scale[start:stop],
            shape=(stop - start, self.in_features),
            zero_point=None if zeros is None else zeros[start // ZEROS : -(-stop // ZEROS)],
            g_idx=None,
            order=None,
            exponent=None if self.exponent is None else self.exponent[start:stop],
        )

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight, with columns in this weight's order."""
        words = self.words[start:stop].view(stop - start, self.groups, 1, -1)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=self.device)[:, None]
        codes = ((words >> shifts) & 15) - 8  # [rows, groups, 8, words of a group]
        in_vectors = torch.compiler.is_compiling() and self._fills_vectors
        zeros, scale = self.zeros(start, stop, in_bytes=in_vectors), self.scale[start:stop]
        if in_vectors:
            scale, zeros = kept(scale), None if zeros is None else kept(zeros)
        if zeros is not None:
            codes = codes - zeros[:, :, None, None]
        dense = scaled(codes, scale[:, :, None, None], self.scale_dtype)
        return dense.to(dtype).reshape(stop - start, self.in_features)


def _split(words: Tensor) -> Tensor:
    """Return int32 ``[n, groups]`` as int16 ``[2 n, groups]``, the low half of each word first."""
    return torch.stack([(words << 16) >> 16, words >> 16], dim=1).flatten(0, 1).to(torch.int16)


def _joined(halves: Tensor) -> Tensor:
    """Return the int32 words that ``_split`` was given."""
    low, high = halves.to(torch.int32).view(-1, 2, halves.shape[1]).unbind(1)
    return (high << 16) | (low & 0xFFFF)


def _exponents(rows: int, device: torch.device) -> Tensor:
    return torch.full((rows,), EXPONENT_OF_ONE, dtype=torch.int32, device=device)


def refuses(weight: PackedWeight) -> str | None:
    """Return why a weight cannot be interleaved, or None if it can."""
    if weight.bits != 4:
        return f"{weight.bits} bits"
    if weight.strategy not in ("channel", "group"):
        return f"strategy {weight.strategy}"
    groups = weight.scale.shape[1]
    if weight.in_features % (groups * NIBBLES):
        return f"groups of {weight.in_features / groups:g} columns, which fill no whole words"
    return uneven_groups(weight)
