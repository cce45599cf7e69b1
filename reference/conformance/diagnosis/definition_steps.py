"""The definition once more, in steps that can be replaced one by one.

``reference`` is written to be read and has no place to put a mistake in; here each step is a
function in a ``Way``. ``RIGHT`` is the definition (a test holds it against the reference); a
mistake is ``RIGHT`` with one step replaced. ``answer_of`` computes what a backend that follows a
way returns, and how near to it such a backend must come.

Source: ``docs/format.md`` and ``docs/numerics.md``; for the tolerance its section "The bound".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import Float4Weight, LoRASlice, PackedWeight
from int4_lora.reference.bounds import FORMATS, gamma
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import DELTA_ROUNDINGS, WEIGHTS
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.dequantization import scale_columns, scale_rows
from int4_lora.reference.float4_weight import BaseWeight, dense_dtype
from int4_lora.reference.rounding import round_once

__all__ = [
    "RIGHT",
    "AnswerOfWay",
    "Way",
    "answer_of",
    "dense_weight",
    "read_codes",
    "rounded_product",
]


@dataclass(frozen=True)
class Way:
    """One function for each step.

    Args:
        shifts: () -> the place of each code in its word, int32 ``[8]``.
        mask: shifted words -> stored numbers.
        code: stored numbers -> signed codes.
        zero_points: (table of zero-points, weight) -> the table as it is read.
        centre: (codes, zero-points) -> their difference.
        group: weight -> the column of the scale table of each input.
        product: (codes, zero-points, scales, centre) -> weights in float64.
        columns: (weights, weight) -> the weights that are used, in their places.
        inputs: x -> x as the base and the adapters read it.
        reach: x -> x as the adapters read it.
        ids: (adapter ids, number of adapters, ids of an earlier call or None) -> ids.
        scaling: scalings -> scalings.
        added: (sum, product, product of zeros, ids, adapter, number of adapters) -> the sum, with
            the product of an adapter for all tokens put in the rows of this adapter's tokens.
        starts: slices -> the first output of each.
        outputs: result -> the result as it is written.
        layout: operands -> the weight that the tensors of another layout hold.
        float4_codes: bytes -> FP4 codes ``[out_features, in_features]``.
        float4_values: FP4 codes -> their values in float64.
        float4_scales: FP4 weight -> its scales in float64, ``[out_features, groups]``.
        float4_global: (codes times scales, global scale) -> weights in float64.
        zero_points_too: whether zero-points are read with this way's shifts, mask and code; else
            with those of ``RIGHT``.
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
    added: Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
    starts: Callable[[Sequence[LoRASlice]], list[int]]
    outputs: Callable[[Tensor], Tensor]
    zero_points_too: bool = True
    float4_codes: Callable[[Tensor], Tensor] = lambda packed: torch.stack(
        [packed & 0xF, packed >> 4], dim=2
    ).flatten(1)
    float4_values: Callable[[Tensor], Tensor] = lambda codes: e2m1_values(codes)
    float4_scales: Callable[[Float4Weight], Tensor] = lambda weight: float4_scale_values(weight)
    float4_global: Callable[[Tensor, Tensor], Tensor] = lambda product, over: product / over
    layout: Callable[[Operands], PackedWeight | None] = lambda operands: operands.packed_weight


def e2m1_values(codes: Tensor) -> Tensor:
    """Return the values of E2M1 codes: (1 + m / 2) 2^(e - 1), or m / 2 where e is 0."""
    sizes = [(1 + m / 2) * 2.0 ** (e - 1) if e else m / 2 for e in range(4) for m in range(2)]
    size = torch.tensor(sizes, dtype=torch.float64)[(codes & 7).to(torch.int64)]
    return torch.where(codes >> 3 & 1 == 1, -size, size)


def float4_scale_values(weight: Float4Weight) -> Tensor:
    """Return the scales of an FP4 weight as float64 ``[out_features, groups]``."""
    if weight.format == "nvfp4":
        return weight.scale.to(torch.float64)
    values = [*(2.0 ** (byte - 127) for byte in range(255)), float("nan")]
    return torch.tensor(values, dtype=torch.float64)[weight.scale.to(torch.int64)]


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
    added=lambda total, product, of_zeros, ids, adapter, adapters: torch.where(
        (ids == adapter)[:, None], product, total
    ),
    starts=lambda slices: [part.start for part in slices],
    outputs=lambda result: result,
)
"""The definition."""


def read_codes(way: Way, packed: Tensor, size: int, dim: int = 1) -> Tensor:
    """Return the codes in words as ``way`` reads them: int64, ``size`` along ``dim``."""
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


def exact_float4(way: Way, weight: Float4Weight) -> Tensor:
    """Return an FP4 weight as ``way`` reads it, not rounded: float64, of the weight's shape."""
    scale = way.float4_scales(weight).repeat_interleave(weight.group_size, dim=1)
    product = way.float4_values(way.float4_codes(weight.packed)) * scale
    if weight.global_scale is None:
        return product
    return way.float4_global(product, weight.global_scale.to(torch.float64))


def dense_weight(way: Way, weight: BaseWeight) -> Tensor:
    """Return the weight as ``way`` reads it: float64 ``[out_features, in_features]``."""
    if isinstance(weight, Float4Weight):
        return round_once(exact_float4(way, weight), dense_dtype(weight)).to(torch.float64)
    codes, zero_points, scales = centred(way, weight)
    return way.columns(way.product(codes, zero_points, scales, way.centre), weight)


@dataclass(frozen=True, eq=False)
class AnswerOfWay:
    """The answer of one way of computing.

    Args:
        exact: integers, or float64.
        tolerance: float64: how far a backend that computes in this way may be from it.
    """

    exact: Tensor
    tolerance: Tensor


def answer_of(
    function: str, operands: Operands, way: Way, manifest: Manifest, earlier_ids: Tensor | None
) -> AnswerOfWay:
    """Return the answer of ``function`` when each step is done as ``way`` does it.

    Args:
        function: any but "pack".
        operands: its arguments, on the CPU.
        way: the steps.
        manifest: the declared roundings.
        earlier_ids: the adapter ids of the previous call, or None.
    """
    if function == "unpack" and operands.packed is not None:
        codes = read_codes(way, operands.packed, operands.size, operands.dim)
        return _exactly(way.outputs(codes.to(torch.int8)))
    weight = operands.base_weight if operands.layout is None else way.layout(operands)
    if function in WEIGHTS and weight is not None:
        dense = way.outputs(dense_weight(way, weight))
        if operands.dtype is not None:
            dense = dense.to(operands.dtype).double()
        loose = 0.0 if manifest.weight_rounded else 2.0**-6
        return AnswerOfWay(dense, dense.abs() * loose)
    if function == "shrink":
        return _part(operands.x, operands, way, manifest, earlier_ids, shrink=True)
    if function == "expand":
        return _part(operands.h, operands, way, manifest, earlier_ids, shrink=False)
    return _layer(operands, way, manifest, earlier_ids)


def _exactly(codes: Tensor) -> AnswerOfWay:
    return AnswerOfWay(codes, torch.zeros(codes.shape, dtype=torch.float64))


def _layer(
    operands: Operands, way: Way, manifest: Manifest, earlier_ids: Tensor | None
) -> AnswerOfWay:
    x, weight = operands.x, operands.weight
    if x is None or weight is None:
        raise ValueError("a layer needs x and weight")
    wide = way.inputs(x.double())
    if isinstance(weight, Float4Weight):
        dense = exact_float4(way, weight)
    else:
        dense = dense_weight(way, weight)
    base, size = wide @ dense.T, wide.abs() @ dense.abs().T
    exact, rank, deltas = base.clone(), 0, torch.zeros_like(base)
    for part, start in zip(operands.slices, way.starts(operands.slices), strict=True):
        ids = _ids(operands, part, way, earlier_ids)
        delta, magnitude = _delta(wide, part, ids, way)
        stop = min(start + delta.shape[1], exact.shape[1])
        exact[:, start:stop] += delta[:, : stop - start]
        size[:, start:stop] += magnitude[:, : stop - start]
        deltas[:, start:stop] += magnitude[:, : stop - start]
        rank = max(rank, part.stack.rank)
    if operands.bias is not None:
        exact, size = exact + operands.bias.double(), size + operands.bias.double().abs()
    tolerance = _gamma(weight.in_features + rank + 8, x, manifest) * size
    if isinstance(weight, Float4Weight) or not manifest.weight_rounded:
        tolerance = tolerance + FORMATS[dense_dtype(weight)].u * (wide.abs() @ dense.abs().T)
    output = FORMATS[x.dtype]
    if manifest.delta_rounded:
        tolerance = tolerance + DELTA_ROUNDINGS * output.u * deltas
    roundings = exact.abs() + (2 * base.abs() + tolerance if manifest.base_rounded else 0)
    tolerance = tolerance + output.u * (roundings + tolerance) + output.product_underflow
    return AnswerOfWay(way.outputs(exact), tolerance)


def _part(
    value: Tensor | None,
    operands: Operands,
    way: Way,
    manifest: Manifest,
    earlier_ids: Tensor | None,
    *,
    shrink: bool,
) -> AnswerOfWay:
    if value is None:
        raise ValueError("shrink needs x, expand needs h")
    part = operands.slices[0]
    ids = _ids(operands, part, way, earlier_ids)
    wide = way.reach(way.inputs(value.double())) if shrink else value.double()
    if shrink:
        exact, size = _shrunk_and_size(wide, part.stack.a, ids, way)
    else:
        exact, size = _expanded(wide, part, ids, way), _expanded(wide, part, ids, way, sizes=True)
    return AnswerOfWay(way.outputs(exact), _gamma(value.shape[1] + 4, value, manifest) * size)


def _delta(x: Tensor, part: LoRASlice, ids: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """Return the delta of a slice, and the sum of its products' magnitudes."""
    h, size = _shrunk_and_size(way.reach(x), part.stack.a, ids, way)
    return _expanded(h, part, ids, way), _expanded(size, part, ids, way, sizes=True)


def _shrunk_and_size(x: Tensor, a: Tensor, ids: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """Return x A^T, and the sum of its products' magnitudes."""
    a = a.double()
    return _shrunk(x, a, ids, way), _shrunk(x.abs(), a.abs(), ids, RIGHT)


def _shrunk(x: Tensor, a: Tensor, ids: Tensor, way: Way) -> Tensor:
    h = torch.zeros(x.shape[0], a.shape[1], dtype=torch.float64)
    for adapter in range(a.shape[0]):
        of_zeros = torch.zeros_like(x[:1]) @ a[adapter].T
        h = way.added(h, x @ a[adapter].T, of_zeros, ids, adapter, a.shape[0])
    return h


def _expanded(h: Tensor, part: LoRASlice, ids: Tensor, way: Way, *, sizes: bool = False) -> Tensor:
    scaling, b = way.scaling(part.stack.scaling.double()), part.stack.b.double()
    added = way.added
    if sizes:
        h, scaling, b, added = h.abs(), scaling.abs(), b.abs(), RIGHT.added
    delta = torch.zeros(h.shape[0], b.shape[1], dtype=torch.float64)
    for adapter in range(b.shape[0]):
        product = scaling[adapter] * (h @ b[adapter].T)
        of_zeros = torch.zeros_like(h[:1]) @ b[adapter].T
        delta = added(delta, product, of_zeros, ids, adapter, b.shape[0])
    return delta


def _ids(operands: Operands, part: LoRASlice, way: Way, earlier_ids: Tensor | None) -> Tensor:
    if operands.adapter_ids is None:
        raise ValueError("adapters need adapter_ids")
    usable = earlier_ids is not None and earlier_ids.shape == operands.adapter_ids.shape
    return way.ids(operands.adapter_ids, part.stack.adapters, earlier_ids if usable else None)


def _gamma(n: int, x: Tensor, manifest: Manifest) -> Tensor:
    """Return gamma_n at twice u, which covers tensor cores: they truncate."""
    return gamma(n, 2 * FORMATS[manifest.sums_of(x)].u)
