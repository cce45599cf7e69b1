"""What a backend returns that does a step another way, and how near it must come to that.

Source: ``docs/numerics.md``, "The bound": the same sums, on a weight that may be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference.bounds import FORMATS, gamma
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.diagnosis.definition_steps import Way, dense_weight, read_codes
from int4_lora.reference.conformance.judging.answers import DELTA_ROUNDINGS
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.lora_stack import LoRASlice

__all__ = ["WrongAnswer", "wrong_answer"]


@dataclass(frozen=True, eq=False)
class WrongAnswer:
    """The answer of a way of computing.

    Args:
        exact: integers, or float64.
        tolerance: float64: how far a backend that computes in this way may be from it.
    """

    exact: Tensor
    tolerance: Tensor


def wrong_answer(
    function: str, operands: Operands, way: Way, manifest: Manifest, earlier_ids: Tensor | None
) -> WrongAnswer:
    """Return what ``function`` returns if every step is done as ``way`` says.

    Args:
        function: any but "pack".
        operands: its arguments, on the CPU.
        way: how each step is done.
        manifest: the roundings declared.
        earlier_ids: the adapter ids of the call before, or None.
    """
    if function == "unpack" and operands.packed is not None:
        codes = read_codes(way, operands.packed, operands.size, operands.dim)
        return _exactly(way.outputs(codes.to(torch.int8)))
    if function == "dequantize" and operands.weight is not None:
        dense = way.outputs(dense_weight(way, operands.weight))
        if operands.dtype is not None:
            dense = dense.to(operands.dtype).double()
        loose = 0.0 if manifest.weight_rounded else 2.0**-6
        return WrongAnswer(dense, dense.abs() * loose)
    if function == "shrink":
        return _part(operands.x, operands, way, manifest, earlier_ids, shrink=True)
    if function == "expand":
        return _part(operands.h, operands, way, manifest, earlier_ids, shrink=False)
    return _layer(operands, way, manifest, earlier_ids)


def _exactly(codes: Tensor) -> WrongAnswer:
    return WrongAnswer(codes, torch.zeros(codes.shape, dtype=torch.float64))


def _layer(
    operands: Operands, way: Way, manifest: Manifest, earlier_ids: Tensor | None
) -> WrongAnswer:
    x, weight = operands.x, operands.weight
    if x is None or weight is None:
        raise ValueError("a layer needs x and weight")
    wide = way.inputs(x.double())
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
    if not manifest.weight_rounded:
        tolerance = tolerance + FORMATS[weight.scale.dtype].u * (wide.abs() @ dense.abs().T)
    output = FORMATS[x.dtype]
    if manifest.delta_rounded:
        tolerance = tolerance + DELTA_ROUNDINGS * output.u * deltas
    roundings = exact.abs() + (2 * base.abs() + tolerance if manifest.base_rounded else 0)
    tolerance = tolerance + output.u * (roundings + tolerance) + output.product_underflow
    return WrongAnswer(way.outputs(exact), tolerance)


def _part(
    value: Tensor | None,
    operands: Operands,
    way: Way,
    manifest: Manifest,
    earlier_ids: Tensor | None,
    *,
    shrink: bool,
) -> WrongAnswer:
    if value is None:
        raise ValueError("shrink needs x, expand needs h")
    part = operands.slices[0]
    ids = _ids(operands, part, way, earlier_ids)
    wide = way.reach(way.inputs(value.double())) if shrink else value.double()
    if shrink:
        exact, size = (_shrunk(one, a, ids) for one, a in _sized(wide, part.stack.a))
    else:
        exact, size = _expanded(wide, part, ids, way), _expanded(wide, part, ids, way, sizes=True)
    return WrongAnswer(way.outputs(exact), _gamma(value.shape[1] + 4, value, manifest) * size)


def _delta(x: Tensor, part: LoRASlice, ids: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """Return the delta of a slice, and the sum of its products' magnitudes."""
    h, size = (_shrunk(one, a, ids) for one, a in _sized(way.reach(x), part.stack.a))
    return _expanded(h, part, ids, way), _expanded(size, part, ids, way, sizes=True)


def _sized(x: Tensor, a: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (x, a.double()), (x.abs(), a.double().abs())


def _shrunk(x: Tensor, a: Tensor, ids: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], a.shape[1], dtype=torch.float64)
    for adapter in range(a.shape[0]):
        mine = ids == adapter
        h[mine] = x[mine] @ a[adapter].T
    return h


def _expanded(h: Tensor, part: LoRASlice, ids: Tensor, way: Way, *, sizes: bool = False) -> Tensor:
    scaling, b = way.scaling(part.stack.scaling.double()), part.stack.b.double()
    if sizes:
        h, scaling, b = h.abs(), scaling.abs(), b.abs()
    delta = torch.zeros(h.shape[0], b.shape[1], dtype=torch.float64)
    for adapter in range(b.shape[0]):
        mine = ids == adapter
        delta[mine] = scaling[adapter] * (h[mine] @ b[adapter].T)
    return delta


def _ids(operands: Operands, part: LoRASlice, way: Way, earlier_ids: Tensor | None) -> Tensor:
    if operands.adapter_ids is None:
        raise ValueError("adapters need adapter_ids")
    usable = earlier_ids is not None and earlier_ids.shape == operands.adapter_ids.shape
    return way.ids(operands.adapter_ids, part.stack.adapters, earlier_ids if usable else None)


def _gamma(n: int, x: Tensor, manifest: Manifest) -> Tensor:
    """Return gamma_n at twice u, which covers tensor cores: they truncate."""
    return gamma(n, 2 * FORMATS[manifest.sums_of(x)].u)
