"""One quantised weight, as a checkpoint stores it.

Source: the ``pack-quantized`` format of compressed-tensors; ``docs/format.md``.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from int4_lora.reference.checks import (
    SCALE_DTYPES,
    as_device,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.packing import check_bits, code_range, pack, unpack, words_for

__all__ = ["PackedWeight", "Strategy", "as_shape", "row_index"]

Strategy = Literal["tensor", "channel", "group", "block"]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The tensors of one quantised ``[out_features, in_features]`` weight, checked on creation.

    The shape of ``scale`` gives the strategy, which says which weights share a scale:

    ========  ===========================  ============================================
    strategy  ``scale``                    ``zero_point`` (None when symmetric)
    ========  ===========================  ============================================
    tensor    ``[1]``                      int8 ``[1]``
    channel   ``[out, 1]``                 int32 ``[ceil(out / n), 1]``, n codes a word
    group     ``[out, groups]``            int32 ``[ceil(out / n), groups]``
    block     ``[row blocks, col blocks]`` int8, the shape of ``scale``
    ========  ===========================  ============================================

    Args:
        packed: int32 ``[out_features, ceil(in_features / n)]``, n = 32 / bits, low bits first.
        scale: float16, bfloat16 or float32. Any value is allowed: NaN, infinite, zero, negative.
        shape: ``(out_features, in_features)``; a checkpoint's int64 ``[2]`` tensor ``weight_shape``
            is converted to a tuple.
        zero_point: packed along dim 0 (outputs) for channel and group, unpacked for tensor and
            block; see the table.
        g_idx: int32 ``[in_features]``, the group of each column, for the strategy "group". Groups
            may have any number of columns. A -1 anywhere means column order, as without g_idx.
        group_size: columns that share a scale, or ``(rows, columns)`` of a block, which is then
            required. None means ``in_features / scale.shape[1]``, which must divide.
        bits: 4 or 8.

    Raises:
        TypeError: a field of the wrong type or dtype.
        ValueError: a field of the wrong shape, value or device; the message names it.

    Example:
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> weight.strategy, weight.symmetric, weight.nbytes
        ('channel', True, 8)

    Source:
        ``docs/format.md``, from ``compressed_tensors/compressors/pack_quantized/base.py``.
    """

    packed: Tensor
    scale: Tensor
    shape: tuple[int, int]
    zero_point: Tensor | None = None
    g_idx: Tensor | None = None
    group_size: int | tuple[int, int] | None = None
    bits: int = 4
    column_order: bool = field(init=False, repr=False, default=True)
    """Whether columns are grouped by position: no ``g_idx``, or a -1 in it."""

    def __post_init__(self) -> None:
        check_bits(self.bits)
        object.__setattr__(self, "shape", as_shape(self.shape))
        check_dtype("packed", self.packed, (torch.int32,))
        check_dtype("scale", self.scale, SCALE_DTYPES)
        _check_packed(self)
        object.__setattr__(self, "column_order", _check_g_idx(self))
        _check_scale(self)
        if self.zero_point is not None:
            _check_zero_point(self, self.zero_point)
        check_one_device(
            packed=self.packed, scale=self.scale, zero_point=self.zero_point, g_idx=self.g_idx
        )

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether no zero-points are stored: every one is 0."""
        return self.zero_point is None

    @property
    def strategy(self) -> Strategy:
        """The rule by which weights share a scale; one group per row is called "channel"."""
        if self.scale.ndim == 1:
            return "tensor"
        if isinstance(self.group_size, tuple):
            return "block"
        return "channel" if self.scale.shape[1] == 1 else "group"

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        tensors = (self.packed, self.scale, self.zero_point, self.g_idx)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the same weight with every tensor on ``device``."""
        device = as_device(device)
        moved = dataclasses.replace(
            self,
            packed=self.packed.to(device),
            scale=self.scale.to(device),
            zero_point=None if self.zero_point is None else self.zero_point.to(device),
            g_idx=None if self.g_idx is None else self.g_idx.to(device),
        )
        object.__setattr__(moved, "column_order", self.column_order)
        return moved

    def rows(self, index: Tensor | slice) -> PackedWeight:
        """Return the weight of some outputs: row ``i`` of the result is row ``index[i]``.

        Zero-points that are packed along the outputs are packed again; ``g_idx``, ``group_size``
        and ``bits`` stay as they are.

        Args:
            index: int64 ``[rows]`` in any order, repeats allowed, or a slice. With the strategy
                "block", rows that share a block in the result must share one here.

        Raises:
            TypeError: ``index`` is neither an int64 tensor nor a slice.
            ValueError: no rows, a row out of range, or rows that do not fit the blocks.

        Example:
            >>> packed = torch.tensor([[-162254320], [0x76543210]], dtype=torch.int32)
            >>> weight = PackedWeight(packed, torch.tensor([[0.5], [0.25]]), shape=(2, 8))
            >>> weight.rows(slice(1, 2)).scale
            tensor([[0.2500]])
        """
        index = row_index(index, self.out_features).to(self.packed.device)
        scale, zero_point = self.scale, self.zero_point
        if self.strategy in ("channel", "group"):
            scale = scale[index]
            if zero_point is not None:
                unpacked = unpack(zero_point, self.out_features, bits=self.bits, dim=0)
                zero_point = pack(unpacked[index], bits=self.bits, dim=0)
        elif isinstance(self.group_size, tuple):
            blocks = _block_index(index, self.group_size[0])
            scale = scale[blocks]
            zero_point = None if zero_point is None else zero_point[blocks]
        return dataclasses.replace(
            self,
            packed=self.packed[index],
            scale=scale,
            shape=(len(index), self.in_features),
            zero_point=zero_point,
        )


def row_index(index: Tensor | slice, rows: int) -> Tensor:
    """Check ``index`` against the number of rows; return it as an int64 tensor.

    Args:
        index: int64 ``[rows]``, or a slice.
        rows: the rows of the weight.

    Raises:
        TypeError: ``index`` is neither an int64 tensor nor a slice.
        ValueError: no rows, or a row out of range.
    """
    if isinstance(index, slice):
        ends = [end for end in (index.start, index.stop) if end is not None]
        if not all(-rows <= end <= rows for end in ends):  # Python would crop the slice
            raise ValueError(f"index must be in [0, {rows}), the rows of weight, got {index}")
        index = torch.tensor(range(rows)[index], dtype=torch.int64)
    check_dtype("index", index, (torch.int64,))
    check_shape("index", index, (None,), "[rows]")
    if not len(index):
        raise ValueError("index must choose at least one row, got none")
    wrong = index[(index < 0) | (index >= rows)]
    if len(wrong):
        raise ValueError(f"index must be in [0, {rows}), the rows of weight, got {wrong[0].item()}")
    return index


def _block_index(index: Tensor, size: int) -> Tensor:
    """Return which block of the weight each block of the result is: int64 ``[blocks]``."""
    block_of_row = index // size
    blocks = block_of_row[::size]
    new_block_of_row = torch.arange(len(index), device=index.device) // size
    wrong = (block_of_row != blocks[new_block_of_row]).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"index must keep to the blocks of {size} rows that share a scale, "
            f"got row {int(index[row])} in one block with row {int(index[row // size * size])}"
        )
    return blocks


def as_shape(shape: object) -> tuple[int, int]:
    """Return a shape as two positive ints.

    Args:
        shape: a tuple or list, or a checkpoint's int64 ``[2]`` tensor.

    Raises:
        TypeError: it does not hold ints.
        ValueError: it does not hold two positive lengths.
    """
    if isinstance(shape, Tensor):
        check_dtype("shape", shape, (torch.int64,))
        shape = tuple(shape.tolist()) if shape.ndim == 1 else shape
    if not isinstance(shape, (list, tuple)) or len(shape) != 2:
        raise ValueError(f"shape must be (out_features, in_features), got {shape!r}")
    if any(isinstance(length, bool) for length in shape):
        raise TypeError(f"shape must hold two ints, got {shape!r}")
    try:
        rows, columns = (operator.index(length) for length in shape)
    except TypeError:
        raise TypeError(f"shape must hold two ints, got {shape!r}") from None
    if rows < 1 or columns < 1:
        raise ValueError(f"shape must hold two positive lengths, got {(rows, columns)}")
    return rows, columns


def _check_packed(weight: PackedWeight) -> None:
    rows, columns = weight.shape
    rule = f"[out_features, words] of a {rows} x {columns} weight at {weight.bits} bits"
    check_shape("packed", weight.packed, (rows, words_for(columns, weight.bits)), rule)


def _check_g_idx(weight: PackedWeight) -> bool:
    """Check ``g_idx`` and return whether columns are grouped by position."""
    if weight.g_idx is None:
        return True
    check_dtype("g_idx", weight.g_idx, (torch.int32,))
    check_shape("g_idx", weight.g_idx, (weight.in_features,), "[in_features]")
    if weight.scale.ndim != 2 or isinstance(weight.group_size, tuple):
        raise ValueError(
            "g_idx needs a scale of [out_features, groups], "
            f"got scale {list(weight.scale.shape)} and group_size {weight.group_size}"
        )
    groups = weight.scale.shape[1]
    if weight.g_idx.is_meta:
        return False  # a meta tensor has no values; ``to`` keeps the answer from before
    low, high = int(weight.g_idx.min()), int(weight.g_idx.max())
    if low < -1 or high >= groups:
        value = low if low < -1 else high
        raise ValueError(f"g_idx must be in [-1, {groups}), the groups of scale, got {value}")
    return low == -1


def _check_scale(weight: PackedWeight) -> None:
    rows, columns = weight.shape
    size = weight.group_size
    if isinstance(size, tuple):
        if len(size) != 2 or any(type(n) is not int or not 0 < n < 2**31 for n in size):
            raise ValueError(f"group_size of blocks must be two positive ints, got {size}")
        blocks = (-(-rows // size[0]), -(-columns // size[1]))
        check_shape("scale", weight.scale, blocks, f"one per block of {size[0]} x {size[1]}")
        return
    if size is not None and type(size) is not int:
        raise TypeError(f"group_size must be an int, a tuple or None, got {type(size).__name__}")
    if size is not None and size < 1:
        raise ValueError(f"group_size must be positive, got {size}")
    if weight.scale.ndim == 1:
        if size is not None:
            raise ValueError(f"group_size must be None for a scale of [1], got {size}")
        check_shape("scale", weight.scale, (1,), "one scale for the tensor")
        return
    check_shape("scale", weight.scale, (rows, None), "[out_features, groups]")
    groups = weight.scale.shape[1]
    if not weight.column_order:  # g_idx names the group of each column: groups need not be full
        if size is not None and groups != -(-columns // size):
            raise ValueError(
                f"group_size must make {groups} groups of {columns} columns, as scale has, "
                f"got {size}"
            )
        return
    if groups < 1 or columns % groups:
        raise ValueError(
            f"scale has {groups} groups, which do not divide in_features = {columns} evenly"
        )
    if size is not None and size * groups != columns:
        raise ValueError(
            f"group_size must be in_features / groups = {columns} / {groups}, got {size}"
        )


def _check_zero_point(weight: PackedWeight, zero_point: Tensor) -> None:
    if weight.strategy in ("channel", "group"):
        check_dtype("zero_point", zero_point, (torch.int32,))
        words = words_for(weight.out_features, weight.bits)
        rule = "[words, groups], packed along dim 0 (out_features),"
        check_shape("zero_point", zero_point, (words, weight.scale.shape[1]), rule)
        return
    check_dtype("zero_point", zero_point, (torch.int8,))
    check_shape("zero_point", zero_point, weight.scale.shape, "the shape of scale")
    if zero_point.is_meta:
        return
    low, high = code_range(weight.bits)
    wrong = zero_point[(zero_point < low) | (zero_point > high)]
    if wrong.numel():
        raise ValueError(f"zero_point must be in [{low}, {high}], got {wrong[0].item()}")
