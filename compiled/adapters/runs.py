"""The adapters' delta of rows in the order of their adapters: one product for each run of rows.

Uncompiled, ``gathered`` copies A and B of its adapter for each row. Here autograd keeps views of A,
of B and of x, and numbers of the rank for each row, so training costs the adapters' own bytes.

Source: ``int4_lora.reference.lora``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import side_by_side
from int4_lora.compiled.products import product
from int4_lora.reference.lora import accumulation_dtype

__all__ = ["add_in_runs"]


def add_in_runs(
    base: Tensor, x: Tensor, slices: Sequence[PreparedSlice], adapter_ids: Tensor
) -> Tensor:
    """Return ``RN_x(base + deltas)``, with gradients for base, x and the adapters.

    Args:
        base: ``[rows, out_features]``.
        x: ``[rows, in_features]``, at least one row.
        slices: the adapters, by slice of the outputs.
        adapter_ids: int ``[rows]``, equal ids together; an id outside ``[0, adapters)`` means none.
            The ids are read.

    Example:
        >>> part = PreparedSlice(torch.ones(2, 1, 3), torch.ones(2, 1, 2), torch.ones(2), start=0)
        >>> add_in_runs(torch.zeros(2, 2), torch.ones(2, 3), [part], torch.tensor([-1, 1]))
        tensor([[0., 0.],
                [3., 3.]])
    """
    sums = accumulation_dtype(x)
    ids, counts = torch.unique_consecutive(adapter_ids, return_counts=True)
    runs = list(zip(ids.tolist(), torch.split(x, counts.tolist()), strict=True))
    deltas = [(part.start, _delta(runs, part, sums)) for part in slices]
    return side_by_side(base, deltas, None, sums, x.dtype)


def _delta(runs: Sequence[tuple[int, Tensor]], part: PreparedSlice, sums: torch.dtype) -> Tensor:
    """Return the delta of a slice: ``[rows, out]``."""
    a, bt, scaling = part.a.unbind(), part.bt.unbind(), part.scaling.to(sums).unbind()
    deltas = []
    for adapter, rows in runs:
        if 0 <= adapter < part.adapters:
            h = product(rows, a[adapter].T, sums)  # [rows, rank]
            deltas.append(scaling[adapter] * (h @ bt[adapter].to(sums)))
        else:
            deltas.append(rows.new_zeros(rows.shape[0], part.bt.shape[2], dtype=sums))
    return torch.cat(deltas)
