"""The codes of 8 bits as signed bytes, row by row: as many bytes as the checkpoint's words.

A checkpoint stores ``q + 128``, four to a word; here each byte is q itself, which vector
instructions widen, and which torch's operator for 8 bits reads. The order is the checkpoint's:
bytes need no shuffle, so that nothing is interleaved.

Source: ``docs/format.md`` for the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int4_lora.compiled.layouts.grouped import GroupedWeight, uneven_groups
from int4_lora.compiled.layouts.layout import in_blocks
from int4_lora.compiled.rounding import scaled
from int4_lora.reference import PackedWeight, pack, unpack

__all__ = ["Int8Weight", "refuses"]

BITS = 8
BYTES = 4  # codes per word of the checkpoint


@dataclass(frozen=True, eq=False)
class Int8Weight(GroupedWeight):
    """An INT8 weight with one scale per row or per group of columns.

    Args:
        codes: int8 ``[out_features, in_features]``, the columns sorted by group.
        scale: ``[out_features, groups]``, as in the checkpoint.
        shape: ``(out_features, in_features)``.
        zero_point: int8 ``[4 ceil(out_features / 4), groups]``, or None.
        g_idx: as in the checkpoint, or None.
        order: int32 ``[in_features]``, the column of x that each column here multiplies, or None if
            both are in the same order.
        group_size: as in the checkpoint's ``PackedWeight``.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    zero_point: Tensor | None
    g_idx: Tensor | None
    order: Tensor | None
    group_size: int | tuple[int, int] | None

    @classmethod
    def from_packed(cls, weight: PackedWeight) -> Int8Weight:
        """Lay out a weight for which ``refuses`` returns None."""
        order = cls.order_of(weight)

        def codes_of(start: int, stop: int) -> Tensor:
            codes = unpack(weight.packed[start:stop], weight.in_features, bits=BITS)
            return codes if order is None else codes[:, order].contiguous()

        return cls(
            codes=in_blocks(weight.out_features, codes_of),
            scale=weight.scale,
            shape=weight.shape,
            zero_point=None if weight.zero_point is None else _bytes(weight.zero_point),
            g_idx=weight.g_idx,
            order=None if order is None else order.to(torch.int32),
            group_size=weight.group_size,
        )

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        tensors = (self.codes, self.scale, self.zero_point, self.g_idx, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def tile(self) -> int:
        """Any row may be the first of a part."""
        return 1

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of rows ``start`` to ``stop``."""
        codes = self.codes[start:stop]
        return pack(codes if self.order is None else codes[:, torch.argsort(self.order)], bits=BITS)

    def with_words(self, packed: Tensor) -> PackedWeight:
        """Return the checkpoint's other tensors, bit for bit, with these words."""
        zeros = self.zero_point
        return PackedWeight(
            packed=packed,
            scale=self.scale,
            shape=self.shape,
            zero_point=None if zeros is None else pack(zeros, bits=BITS, dim=0),
            g_idx=self.g_idx,
            group_size=self.group_size,
            bits=BITS,
        )

    def part(self, start: int, stop: int) -> Int8Weight:
        """Return rows as a weight that shares the memory of this weight."""
        return replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            shape=(stop - start, self.in_features),
            zero_point=None if self.zero_point is None else self.zero_point[start:stop],
            g_idx=None,
            order=None,
        )

    def terms(
        self, x: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yield all scales, with all codes, ``q - z``, and all columns of x, by group."""
        codes = self._centred(0, self.out_features, dtype).unsqueeze(0)
        columns = x.view(x.shape[0], 1, self.groups, -1).to(dtype)
        yield self.scale_of_sums(dtype), [(codes, columns)]

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight, with columns in this weight's order."""
        codes = self._centred(start, stop, torch.float32)
        dense = scaled(codes, self.scale[start:stop, :, None])
        return dense.to(dtype).reshape(stop - start, self.in_features)

    def _centred(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return ``q - z`` of rows: ``[stop - start, groups, columns of a group]``, exact.

        Inductor vectorises the conversion of bytes to floats, not that of bytes to wider integers.
        """
        codes = self.codes[start:stop].view(stop - start, self.groups, -1).to(dtype)
        if self.zero_point is None:
            return codes
        return codes - self.zero_point[start:stop, :, None].to(dtype)


def _bytes(words: Tensor) -> Tensor:
    """Return the zero-points of all words, those of the padding as well."""
    return unpack(words, BYTES * words.shape[0], bits=BITS, dim=0)


def refuses(weight: PackedWeight) -> str | None:
    """Return why a weight cannot be held as bytes, or None if it can."""
    if weight.packed.device.type != "cpu":
        return f"the device {weight.packed.device.type}"
    if weight.bits != BITS:
        return f"{weight.bits} bits"
    if weight.strategy not in ("channel", "group"):
        return f"strategy {weight.strategy}"
    if weight.in_features % BYTES:
        return f"rows of {weight.in_features} columns, which fill no whole words"
    return uneven_groups(weight)
