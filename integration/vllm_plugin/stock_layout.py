"""vLLM's layout of INT4 weights on CPUs, read by our code: one copy of the weight serves both.

vLLM's ``CPUWNA16LinearKernel`` repacks a weight: blocks of 16 outputs, each stored column by
column, a column in two words of eight outputs. Scales and zero-points are transposed. Our code for
many tokens reads any layout, so that it can multiply by the tensors that vLLM's kernel holds. Its
code for few tokens reads layouts of its own, and vLLM's kernel reads none of them. The layouts of
vLLM's kernels for GPUs (Marlin, Machete) are not read.

Whether a layer has this layout is not asked of vLLM: the checkpoint's bits must come back from it.

Source: vLLM's ``CPUWNA16LinearKernel._process_gptq_weights_w4a16``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled import PreparedWeight
from int4_lora.compiled.rounding import scaled
from int4_lora.reference import PackedWeight, pack

__all__ = ["VllmCPUWeight", "shared_weight"]

ROWS, CODES = 16, 8  # outputs of a block, codes of a word


@dataclass(frozen=True, eq=False)
class VllmCPUWeight(PreparedWeight):
    """An INT4 weight in the layout of vLLM's kernel for CPUs.

    Args:
        words: int32 ``[out_features / 16, 2 * in_features]``: two words for each column, with the
            codes of eight outputs each, low nibble first.
        scale: ``[groups, out_features]``.
        shape: ``(out_features, in_features)``.
        zero_point: int32 ``[groups, out_features / 8]``, or None.
        group_size: as in the checkpoint's ``PackedWeight``.
    """

    words: Tensor
    scale: Tensor
    shape: tuple[int, int]
    zero_point: Tensor | None
    group_size: int | tuple[int, int] | None

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that dense weights are rounded to."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.words.device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        tensors = (self.words, self.scale, self.zero_point)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def tile(self) -> int:
        """The outputs of a block."""
        return ROWS

    def packed_rows(self, start: int, stop: int) -> Tensor:
        """Return the checkpoint's words of rows ``start`` to ``stop``."""
        codes = self._codes(start, stop).permute(0, 2, 1)
        return pack(codes.reshape(stop - start, self.in_features).to(torch.int8))

    def with_words(self, packed: Tensor) -> PackedWeight:
        """Return the checkpoint's other tensors, bit for bit, with these words."""
        return PackedWeight(
            packed=packed,
            scale=self.scale.T.contiguous(),
            shape=self.shape,
            zero_point=None if self.zero_point is None else self.zero_point.T.contiguous(),
            group_size=self.group_size,
        )

    def part(self, start: int, stop: int) -> VllmCPUWeight:
        """Return rows as a weight that shares the memory of this weight."""
        zeros = self.zero_point
        return replace(
            self,
            words=self.words[start // ROWS : stop // ROWS],
            scale=self.scale[:, start:stop],
            shape=(stop - start, self.in_features),
            zero_point=None if zeros is None else zeros[:, start // CODES : stop // CODES],
        )

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight, as a transposed view: blocks are stored by column."""
        groups, blocks = self.scale.shape[0], (stop - start) // ROWS
        codes = self._codes(start, stop).view(blocks, groups, -1, ROWS)
        if self.zero_point is not None:
            words = self.zero_point[:, start // CODES : stop // CODES]
            codes = codes - _by_block(_unpacked(words).flatten(1))
        dense = scaled(codes, _by_block(self.scale[:, start:stop])).to(dtype)
        columns = dense.view(blocks, self.in_features, ROWS).permute(1, 0, 2)
        return columns.reshape(self.in_features, stop - start).T

    def _codes(self, start: int, stop: int) -> Tensor:
        """Return the codes of rows: int32 ``[blocks, in_features, 16]``."""
        words = self.words[start // ROWS : stop // ROWS]
        return _unpacked(words).view(-1, self.in_features, ROWS)


def shared_weight(layer: Any, packed: PackedWeight) -> VllmCPUWeight | None:
    """Return the weight that vLLM's kernel has laid out in a layer, for our code to read.

    Args:
        layer: vLLM's layer, after its kernel has processed the weights.
        packed: the checkpoint's tensors.

    Returns:
        The same tensors, not copied; or None if they do not give the checkpoint's bits back.
    """
    zero_point = getattr(layer, "weight_zero_point", None)
    rows, columns = packed.shape
    groups = packed.scale.shape[1]
    held = [(layer.weight_packed.data, torch.int32, (rows // ROWS, 2 * columns))]
    held.append((layer.weight_scale.data, packed.scale.dtype, (groups, rows)))
    if zero_point is not None:
        held.append((zero_point.data, torch.int32, (groups, rows // CODES)))
    if any(
        tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous()
        for tensor, dtype, shape in held
    ):
        return None
    words, scale, *zeros = (tensor for tensor, _, _ in held)
    weight = VllmCPUWeight(
        words, scale, packed.shape, zeros[0] if zeros else None, packed.group_size
    )
    return weight if weight.holds(packed) else None


def _unpacked(words: Tensor) -> Tensor:
    """Return the codes of words, ``[..., words, 8]`` from -8 to 7."""
    shifts = torch.arange(0, 4 * CODES, 4, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15) - 8


def _by_block(of_groups: Tensor) -> Tensor:
    """Return ``[groups, rows]`` as ``[blocks, groups, 1, 16]``."""
    return of_groups.reshape(len(of_groups), -1, ROWS).permute(1, 0, 2).unsqueeze(2)
