"""A wrong result as a map: how far each element is from the exact answer, and what lies where.

Source: ``docs/commands/conform.md``, "--report".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference import AWQTensors, Float4Weight
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.evidence import JudgedCall
from int4_lora.reference.conformance.judging.answers import WEIGHTS
from int4_lora.reference.dequantization import scale_columns, scale_of_each_weight
from int4_lora.reference.float4 import group_scales

__all__ = ["BOUNDS", "NOT_FINITE", "RIGHT_CLOSE", "Axis", "ErrorMap", "Unit", "error_map"]

RIGHT, RIGHT_CLOSE, FIRST_WRONG, NOT_FINITE = 0, 1, 2, 6
"""Classes of elements: right; right, but beyond half the bound; four sizes of errors; wrong, and
the result or the exact answer is NaN or infinite."""

WORD = 8  # codes
NAMED_TOKENS = 24  # more names do not fit beside the map
DIMENSIONS = {
    "pack": ("output", "word"),
    "unpack": ("output", "column"),
    **dict.fromkeys(WEIGHTS, ("output", "column")),
    "shrink": ("token", "rank"),
}


@dataclass(frozen=True)
class Unit:
    """The unit of errors, and the four sizes that a map tells apart.

    Args:
        name: what errors are measured in.
        limits: the upper limits of the first three sizes.
        labels: of right elements, of those beyond half the bound ("" where there are none), of
            the four sizes, and of values that are not finite.
    """

    name: str
    limits: tuple[float, float, float]
    labels: tuple[str, str, str, str, str, str, str]


OTHER_CLASS = "NaN or infinity"
BOUNDS = Unit(
    "error / bound",
    (2.0, 10.0, 100.0),
    (
        "right",
        "right, beyond half the bound",
        "wrong, up to 2 bounds",
        "2 to 10",
        "10 to 100",
        "more than 100",
        OTHER_CLASS,
    ),
)
STEPS = Unit(
    "error / scale",
    (0.05, 0.5, 1.5),
    (
        "right",
        "",
        "wrong by a rounding (up to 1/20 of the scale)",
        "up to half the scale",
        "about the scale: off by one code",
        "more",
        OTHER_CLASS,
    ),
)
FLOAT4_STEPS = Unit(
    "error / scale",
    (0.05, 0.25, 2.25),
    (
        "right",
        "",
        "wrong by a rounding (up to 1/20 of the scale), or in the sign of zero",
        "up to a quarter of the scale",
        "up to 2 scales: off by one code",
        "more",
        OTHER_CLASS,
    ),
)
CODES = Unit(
    "difference of codes",
    (1.5, 4.5, 7.5),
    ("right", "", "off by 1", "by 2 to 4", "by 5 to 7", "by 8 or more", ""),
)
WORDS = Unit(
    "wrong codes in the word",
    (1.5, 3.5, 6.5),
    ("right", "", "1 of 8 codes wrong", "2 or 3", "4 to 6", "7 or 8", ""),
)


@dataclass(frozen=True, eq=False)
class Axis:
    """One axis of a map.

    Args:
        name: what its positions are.
        length: their number.
        lines: the positions before which a group, a block or a slice begins.
        lines_mean: what begins at the lines; "" if there are none.
        words: whether every eighth position begins a packed word.
        names: a name for each position, or none.
        groups: int64 ``[length]``, the group of each position where groups are not contiguous.
    """

    name: str
    length: int
    lines: tuple[int, ...] = ()
    lines_mean: str = ""
    words: bool = False
    names: tuple[str, ...] = ()
    groups: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ErrorMap:
    """The class of every element of a result, with the axes.

    Args:
        classes: int64 ``[rows, columns]``, from ``RIGHT`` to ``NOT_FINITE``.
        wrong: bool, of the same shape.
        unit: of the sizes.
        rows: the first axis.
        columns: the second axis.
    """

    classes: Tensor
    wrong: Tensor
    unit: Unit
    rows: Axis
    columns: Axis


def error_map(function: str, call: JudgedCall) -> ErrorMap | None:
    """Return the map of a call's errors, or None if the result has other than two dimensions.

    Args:
        function: the function that was called.
        call: the call.
    """
    if call.result.ndim != 2 or not call.result.numel():
        return None
    unit, errors = _errors(function, call)
    wrong = _wrong(call, errors, unit)
    classes = torch.zeros(errors.shape, dtype=torch.int64)
    if unit is BOUNDS:
        classes[errors > 0.5] = RIGHT_CLOSE
    size = torch.bucketize(errors, torch.tensor(unit.limits, dtype=errors.dtype))
    classes = torch.where(wrong, FIRST_WRONG + size, classes)
    if call.result.is_floating_point():
        finite = call.held.exact.isfinite() & call.result.isfinite()
        classes[wrong & ~finite] = NOT_FINITE
    rows, columns = _axes(function, call.operands, call.result.shape)
    return ErrorMap(classes, wrong, unit, rows, columns)


def _errors(function: str, call: JudgedCall) -> tuple[Unit, Tensor]:
    """Return how far each element is from the exact answer, and in which unit."""
    got, exact, weight = call.result, call.held.exact, call.operands.packed_weight
    if function == "pack":
        shifts = 4 * torch.arange(WORD)
        nibbles = [(words.long().unsqueeze(-1) >> shifts) & 0xF for words in (got, exact)]
        return WORDS, (nibbles[0] != nibbles[1]).sum(dim=-1).double()
    if function == "unpack":
        return CODES, (got.double() - exact.double()).abs()
    error = (got.double() - exact.double()).abs()
    if function in WEIGHTS and weight is not None and not bool(call.held.bound.any()):
        return STEPS, _in_scales(error, scale_of_each_weight(weight).double())
    if function in WEIGHTS and isinstance(call.operands.weight, Float4Weight):
        return FLOAT4_STEPS, _in_scales(error, _float4_scale_of_each_weight(call.operands.weight))
    share = torch.where(error > 0, error / call.held.bound, 0.0)
    return BOUNDS, torch.where(call.held.bound.isinf(), 0.0, share).nan_to_num(nan=torch.inf)


def _in_scales(error: Tensor, scale: Tensor) -> Tensor:
    return torch.where(error > 0, error / scale.abs(), 0.0).nan_to_num(nan=torch.inf)


def _float4_scale_of_each_weight(weight: Float4Weight) -> Tensor:
    """Return the scale of every FP4 code, divided by the global scale: float64 ``[out, in]``."""
    scale = group_scales(weight).repeat_interleave(weight.group_size, dim=1)
    if weight.global_scale is None:
        return scale
    return scale / weight.global_scale.to(torch.float64)


def _wrong(call: JudgedCall, errors: Tensor, unit: Unit) -> Tensor:
    finding = call.finding
    wrong = torch.zeros_like(errors, dtype=torch.bool)
    if finding is not None and finding.wrong is not None:
        wrong |= finding.wrong
    return wrong | (errors > 1.0) if unit is BOUNDS else wrong


def _axes(function: str, operands: Operands, shape: Sequence[int]) -> tuple[Axis, Axis]:
    first, second = DIMENSIONS.get(function, ("token", "output"))
    if function == "unpack":
        along = operands.dim
        return Axis(first, shape[0], words=along == 0), Axis(second, shape[1], words=along == 1)
    if function in WEIGHTS:
        return _outputs(operands, shape[0]), _columns(operands, shape[1])
    if first != "token":
        return Axis(first, shape[0]), Axis(second, shape[1])
    tokens = Axis(first, shape[0], names=_token_names(operands, shape[0]))
    if second == "rank":
        return tokens, Axis(second, shape[1])
    return tokens, _outputs(operands, shape[1])


def _token_names(operands: Operands, count: int) -> tuple[str, ...]:
    """Return "3: adapter 1" for every token, where there are adapters and few tokens."""
    if operands.adapter_ids is None or count > NAMED_TOKENS:
        return ()
    ids = operands.adapter_ids.tolist()
    return tuple(
        f"{token}: {'no adapter' if adapter == -1 else f'adapter {adapter}'}"
        for token, adapter in enumerate(ids)
    )


def _outputs(operands: Operands, length: int) -> Axis:
    """Return the axis of outputs: lines at slices or blocks, words of zero-points."""
    weight = operands.packed_weight
    lines: tuple[int, ...] = ()
    mean = ""
    if len(operands.slices) > 1 or any(part.start for part in operands.slices):
        ends = {end for part in operands.slices for end in (part.start, part.stop)}
        lines, mean = tuple(sorted(ends - {0, length})), "slices"
    elif weight is not None and isinstance(weight.group_size, tuple):
        lines, mean = tuple(range(weight.group_size[0], length, weight.group_size[0])), "blocks"
    zero_point = None if weight is None else weight.zero_point
    words = zero_point is not None and zero_point.dtype == torch.int32
    return Axis("output", length, lines, mean, words)


def _columns(operands: Operands, length: int) -> Axis:
    """Return the axis of columns of a weight: lines at groups, words of codes but for AWQ."""
    if isinstance(operands.weight, Float4Weight):
        size = operands.weight.group_size
        return Axis("column", length, lines=tuple(range(size, length, size)), lines_mean="groups")
    weight = operands.packed_weight
    if weight is None:
        return Axis("column", length)
    groups = scale_columns(weight)
    changes = (groups.diff().nonzero().flatten() + 1).tolist()
    contiguous = len(changes) < weight.scale.shape[-1]
    mean = "blocks" if isinstance(weight.group_size, tuple) else "groups"
    return Axis(
        "column",
        length,
        lines=tuple(changes) if contiguous else (),
        lines_mean=mean if contiguous and changes else "",
        words=not isinstance(operands.layout, AWQTensors),
        groups=None if contiguous else groups,
    )
