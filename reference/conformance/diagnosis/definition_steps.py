"""The definition once more, in steps that can be replaced one by one.

``reference`` is written to be read and has no holes to put a mistake in; here each step is a
function in a ``Way``. ``RIGHT`` is the definition (a test holds it against the reference); a
mistake is ``RIGHT`` with one step replaced.

Source: ``docs/format.md`` and ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, PackedWeight
from int4_lora.reference.dequantization import scale_columns, scale_rows

__all__ = ["RIGHT", "Way", "centred", "dense_weight", "read_codes"]


@dataclass(frozen=True)
class Way:
    """How each step is done.

    Args:
        shifts: () -> the place of each code in its word, int32 ``[8]``.
        mask: shifted words -> stored numbers.
        code: stored numbers -> signed codes.
        zero_points: (table of zero-points, weight) -> the table as it is read.
        centre: (codes, zero-points) -> their difference.
        group: weight -> the column of the scale table of each input.
        product: (codes, zero-points, scales, centre) -> weights in float64.
        columns: (weights, weight) -> the weights that take part, in their places.
        inputs: x -> x as the base and the adapters see it.
        reach: x -> x as the adapters see it.
        ids: (adapter ids, number of adapters, ids of an earlier call or None) -> ids.
        scaling: scalings -> scalings.
        starts: slices -> where each writes.
        outputs: result -> the result that is written.
        zero_points_too: whether zero-points are read by shifts, mask and code of this way, or as
            they should be.
    """

    shifts: Callable[[], Tensor]
    mask: Callable[[Tensor], Tensor]
    code: Callable[[Tensor], Tensor]
    zero_points: Callable[[Tensor, PackedWeight], Tensor]
    centre: Callable[[Tensor, Tensor], Tensor]
    group: Callable[[PackedWeight], Tensor]
    product: Callable[[Tensor, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor]
    columns: Callable[[Tensor, PackedWeight], Tensor]
    inputs: Callable[[Tensor], Tensor]
    reach: Callable[[Tensor], Tensor]
    ids: Callable[[Tensor, int, Tensor | None], Tensor]
    scaling: Callable[[Tensor], Tensor]
    starts: Callable[[Sequence[LoRASlice]], list[int]]
    outputs: Callable[[Tensor], Tensor]
    zero_points_too: bool = True


def rounded_product(
    codes: Tensor, zero_points: Tensor, scale: Tensor, centre: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return RN((q - z) * s) in the dtype of the scale, as float64."""
    return (centre(codes, zero_points).to(scale.dtype) * scale).to(torch.float64)


RIGHT = Way(
    shifts=lambda: 4 * torch.arange(8, dtype=torch.int32),
    mask=lambda shifted: shifted & 0xF,
    code=lambda stored: stored - 8,
    zero_points=lambda table, weight: table,
    centre=lambda codes, zero_points: codes - zero_points,
    group=scale_columns,
    product=rounded_product,
    columns=lambda dense, weight: dense,
    inputs=lambda x: x,
    reach=lambda x: x,
    ids=lambda ids, adapters, earlier: ids,
    scaling=lambda scaling: scaling,
    starts=lambda slices: [part.start for part in slices],
    outputs=lambda result: result,
)
"""The definition."""


def read_codes(way: Way, packed: Tensor, size: int, dim: int = 1) -> Tensor:
    """Return the codes of words, as ``way`` reads them: int64, ``size`` along ``dim``."""
    rows = packed if dim == 1 else packed.T
    stored = way.mask(rows.unsqueeze(2) >> way.shifts())  # [rows, words, 8]
    codes = way.code(stored).flatten(1)[:, :size].to(torch.int64)
    return codes if dim == 1 else codes.T


def centred(way: Way, weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, zero-points and scales of every weight: ``[out_features, in_features]``."""
    codes = read_codes(way, weight.packed, weight.in_features)
    rows = scale_rows(weight)[:, None]
    columns = way.group(weight)
    scales = weight.scale.reshape(-1, weight.scale.shape[-1])[rows, columns]
    if weight.zero_point is None:
        return codes, torch.zeros_like(codes), scales
    if weight.zero_point.dtype == torch.int32:
        reader = way if way.zero_points_too else RIGHT
        table = read_codes(reader, weight.zero_point, weight.out_features, dim=0)
    else:
        table = weight.zero_point.reshape(-1, weight.scale.shape[-1]).to(torch.int64)
    return codes, way.zero_points(table, weight)[rows, columns], scales


def dense_weight(way: Way, weight: PackedWeight) -> Tensor:
    """Return the weight as ``way`` reads it: float64 ``[out_features, in_features]``."""
    codes, zero_points, scales = centred(way, weight)
    return way.columns(way.product(codes, zero_points, scales, way.centre), weight)
