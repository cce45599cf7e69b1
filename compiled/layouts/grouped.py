"""A layout with a scale for each row or group of columns, its columns sorted by group.

With a ``g_idx`` of balanced groups, columns are first sorted by group, and x is gathered to match.

Source: ``docs/format.md`` for ``g_idx``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference import PackedWeight

__all__ = ["GroupedWeight", "uneven_groups"]


class GroupedWeight(PreparedWeight):
    """A weight whose rows are groups of as many columns each, which share a scale.

    Subclasses have the fields ``scale``: ``[out_features, groups]``; and ``order``: int32
    ``[in_features]``, the column of x that each column here multiplies, or None if both are in the
    same order.
    """

    scale: Tensor
    order: Tensor | None

    @staticmethod
    def order_of(weight: PackedWeight) -> Tensor | None:
        """Return the order that sorts a weight's columns by group: int64, or None if they are."""
        if weight.g_idx is None or weight.column_order:
            return None
        return torch.argsort(weight.g_idx, stable=True)

    @property
    def scale_dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype that dense weights are rounded to."""
        return self.scale.dtype

    @property
    def groups(self) -> int:
        """The groups per row."""
        return self.scale.shape[1]

    def scale_of_sums(self, dtype: torch.dtype) -> Tensor:
        """Return all scales, for the sums of their groups: ``[1, out_features, groups, 1]``."""
        return self.scale.to(dtype)[None, :, :, None]

    def arrange(self, x: Tensor) -> Tensor:
        """Return x with its columns in this weight's order."""
        return x if self.order is None else x.index_select(1, self.order)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the dense weight, with columns in the order of x."""
        rows = self.rows(start, stop, dtype)
        return rows if self.order is None else rows[:, torch.argsort(self.order)]

    @abstractmethod
    def terms(
        self, x: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """Yield scales, and the parts of the codes and of x whose products they multiply.

        The scaled products of all parts add up to ``x W^T``.

        Args:
            x: ``[tokens, in_features]``, its columns in this weight's order.
            dtype: the dtype of all, which holds the codes exactly.

        Yields:
            Scales ``[1, out_features, groups, 1]``, of all groups or of some, and pairs: the codes
            ``[1, out_features, groups, n]``, which are q - z of integers, and their columns of x
            ``[tokens, 1, groups, n]``.
        """


def uneven_groups(weight: PackedWeight) -> str | None:
    """Return that the groups of a ``g_idx`` differ in size, or None if they do not."""
    if weight.g_idx is None or weight.column_order:
        return None
    sizes = torch.bincount(weight.g_idx, minlength=weight.scale.shape[1])
    return "unbalanced groups of g_idx" if int(sizes.min()) != int(sizes.max()) else None
