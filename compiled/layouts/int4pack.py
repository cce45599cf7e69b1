"""torch's own INT4 layout for CPUs: blocks of output rows, and a table of scales.

``aten::_weight_int4pack_mm_for_cpu`` reads rows in blocks of 64 (AVX-512) or 32 (AVX2). A block is
stored column by column. The low nibbles of a column's bytes hold the first half of the block's
rows, the high nibbles the second half. The rows after the last whole block are stored in pairs.

A table ``[groups, out_features, 2]`` holds scales and offsets in x's dtype. The offsets are all 0
here; they cost as much memory as the scales.

Source: ``aten/src/ATen/native/cpu/int4mm_kernel.cpp`` of PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from int4_lora.compiled.layouts.layout import PreparedWeight, in_blocks
from int4_lora.compiled.rounding import scaled
from int4_lora.reference import PackedWeight, pack, unpack

__all__ = ["Int4PackWeight", "block_rows", "refuses"]

GROUP_SIZES = (256, 128, 64, 32)
ROWS = 16  # the operator requires a multiple of this as out_features
BLOCKS = (64, 32)
LARGEST = 2**31  # bytes
INNER_TILES = 1  # ignored by the CPU's operator


@dataclass(frozen=True, eq=False)
class Int4PackWeight(PreparedWeight):
    """A symmetric INT4 weight in the layout of torch's CPU operator.

    Args:
        data: uint8 ``[out_features, in_features / 2]``, the codes in the operator's order.
        table: ``[groups, out_features, 2]``: the scale, and 0.
        shape: ``(out_features, in_features)``.
        block: rows per block.
        groups: groups per row in the checkpoint; the table has more where the operator takes only a
            divisor of the checkpoint's group size.
        group_size: as in the checkpoint's ``PackedWeight``.
        g_idx: as in the checkpoint, there in column order, or None.
    """

    data: Tensor
    table: Tensor
    shape: tuple[int, int]
    block: int
    groups: int
    group_size: int | tuple[int, int] | None
    g_idx: Tensor | None

    @classmethod
    def from_packed(cls, weight: PackedWeight) -> Int4PackWeight:
        """Lay out a weight for which ``refuses`` returns None."""
        groups = weight.scale.shape[1]
        repeats = weight.in_features // groups // _columns_of_a_scale(weight)
        scale = weight.scale.repeat_interleave(repeats, dim=1).T  # [table groups, out]
        block = block_rows()
        assert block is not None, "refuses() was not asked"

        def converted(start: int, stop: int) -> Tensor:
            codes = unpack(weight.packed[start:stop], weight.in_features).to(torch.int32) + 8
            laid_out: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                codes, INNER_TILES
            )
            return laid_out

        return cls(
            data=in_blocks(weight.out_features, converted),
            table=torch.stack([scale, torch.zeros_like(scale)], dim=2),
            shape=weight.shape,
            block=block,
            groups=groups,
            group_size=weight.group_size,
            g_idx=weight.g_idx,
        )

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that dense weights are rounded to."""
        return self.table.dtype

    @property
    def columns_of_a_scale(self) -> int:
        """The operator's group size: the columns that share an entry of the table."""
        return self.in_features // self.table.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        g_idx = 0 if self.g_idx is None else self.g_idx.nbytes
        return self.data.nbytes + self.table.nbytes + g_idx

    @property
    def tile(self) -> int:
        """The rows per block."""
        return self.block

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of rows ``start`` to ``stop``."""
        return pack(self._codes(start, stop).T.contiguous())

    def with_words(self, packed: Tensor) -> PackedWeight:
        """Return the checkpoint's other tensors, bit for bit, with these words."""
        repeats = self.table.shape[0] // self.groups
        return PackedWeight(
            packed=packed,
            scale=self.table[::repeats, :, 0].T.contiguous(),
            shape=self.shape,
            g_idx=self.g_idx,
            group_size=self.group_size,
        )

    def blocks(self, most_rows: int = 1024) -> Iterator[tuple[int, int]]:
        """Yield where to start and to stop; the rows after the last whole block come by themselves.

        Args:
            most_rows: the rows of a block, unless ``tile`` needs more.
        """
        whole = self.out_features // self.block * self.block
        for start, stop in super().blocks(most_rows):
            if start < whole < stop:
                yield start, whole
                start = whole
            yield start, stop

    def part(self, start: int, stop: int) -> Int4PackWeight:
        """Return rows as a weight that shares the memory of this weight."""
        return replace(
            self,
            data=self.data[start:stop],
            table=self.table[:, start:stop],
            shape=(stop - start, self.in_features),
            g_idx=None,
        )

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight, as a transposed view of ``columns``."""
        return self.columns(start, stop, dtype).T

    def columns(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight, transposed: ``[in_features, stop - start]``."""
        codes = self._codes(start, stop).view(self.table.shape[0], -1, stop - start)
        dense = scaled(codes, self.table[:, None, start:stop, 0])
        return dense.to(dtype).reshape(self.in_features, stop - start)

    def _codes(self, start: int, stop: int) -> Tensor:
        """Return the codes of rows, transposed: int8 ``[in_features, stop - start]``."""
        whole = min(stop, self.out_features // self.block * self.block)
        parts = []
        if whole > start:
            blocks = self.data[start:whole].view(-1, self.in_features, self.block // 2)
            halves = torch.stack([blocks & 15, blocks >> 4], dim=2)  # [blocks, in, half, byte]
            parts.append(halves.permute(1, 0, 2, 3).reshape(self.in_features, whole - start))
        if stop > max(whole, start):
            pairs = self.data[max(whole, start) : stop].view(self.in_features, -1)
            parts.append(torch.stack([pairs & 15, pairs >> 4], dim=2).flatten(1))
        codes = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return codes.to(torch.int8) - 8


@cache
def block_rows() -> int | None:
    """Return the rows per block on this CPU, or None if its layout is not known."""
    if not hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu"):
        return None
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (BLOCKS[0] + ROWS, 32), generator=generator, dtype=torch.int32)
    data = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)
    table = torch.empty(1, *codes.shape[:1], 2)
    shape = (codes.shape[0], codes.shape[1])
    for block in BLOCKS:
        found = Int4PackWeight(data, table, shape, block, 1, None, None)._codes(0, shape[0])
        if torch.equal(found.T.to(torch.int32) + 8, codes):
            return block
    return None


def refuses(weight: PackedWeight) -> str | None:
    """Return why a weight cannot have this layout, or None if it can."""
    if weight.packed.device.type != "cpu":
        return f"the device {weight.packed.device.type}"
    if weight.bits != 4:
        return f"{weight.bits} bits"
    if weight.strategy not in ("channel", "group") or not weight.column_order:
        return "g_idx" if not weight.column_order else f"strategy {weight.strategy}"
    if not weight.symmetric:
        return "zero-points: the operator rounds their product with the scale"
    if weight.out_features % ROWS:
        return f"out_features {weight.out_features}, no multiple of {ROWS}"
    if _columns_of_a_scale(weight) == 0:
        return f"groups of {weight.in_features / weight.scale.shape[1]:g} columns"
    if weight.packed.numel() * weight.packed.element_size() >= LARGEST:
        return "2^31 bytes or more, which the operator counts in 32 bits"
    if block_rows() is None:
        return "a CPU whose layout is not known"
    return None


def _columns_of_a_scale(weight: PackedWeight) -> int:
    """Return the operator's largest group size that divides the weight's, or 0."""
    columns = weight.in_features // weight.scale.shape[1]
    return next((size for size in GROUP_SIZES if columns % size == 0), 0)
