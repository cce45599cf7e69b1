"""Where the wrong elements of a result are: by adapter, expert, slice, group, code and place.

Source: ``docs/commands/conform.md``, "--report".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.integration.conformance.report.error_map import WORD
from int4_lora.reference import AWQTensors, Float4Weight
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.evidence import JudgedCall
from int4_lora.reference.conformance.judging.answers import WEIGHTS
from int4_lora.reference.dequantization import scale_columns
from int4_lora.reference.float4 import E2M1, unpack_float4

__all__ = ["Breakdown", "Part", "breakdowns"]

TELLING = 0.3  # the least difference between the shares of two parts that is shown
MOST = 32  # parts


@dataclass(frozen=True)
class Part:
    """Some elements of a result.

    Args:
        name: of the part.
        share: of its elements, those that are wrong.
    """

    name: str
    share: float


@dataclass(frozen=True)
class Breakdown:
    """How the wrong elements are distributed over parts of a result.

    Args:
        by: what the parts are.
        parts: in their order.
    """

    by: str
    parts: tuple[Part, ...]

    @property
    def only(self) -> str:
        """The parts that are wrong at all, in words, or "" if all parts are."""
        wrong = [part.name for part in self.parts if part.share]
        return "" if len(wrong) == len(self.parts) else f"only {', '.join(wrong)}"


def breakdowns(function: str, call: JudgedCall, wrong: Tensor) -> list[Breakdown]:
    """Return the ways to divide a result of which some parts are much more wrong than others.

    Args:
        function: the function that was called.
        call: the call.
        wrong: bool, of the result's shape.
    """
    possible = _divisions(function, call, wrong) if bool(wrong.any()) else ()
    shown = []
    for division in possible:
        shares = [part.share for part in division.parts]
        if 1 < len(shares) <= MOST and max(shares) - min(shares) >= TELLING:
            shown.append(division)
    return shown


def _divisions(function: str, call: JudgedCall, wrong: Tensor) -> Iterator[Breakdown]:
    operands = call.operands
    if function == "pack":
        shifts = 4 * torch.arange(WORD)
        differing = (call.result.long() ^ call.held.exact.long()).unsqueeze(-1) >> shifts
        by_place = ((differing & 0xF) != 0).double().mean(dim=(0, 1))
        parts = (Part(str(place), share) for place, share in enumerate(by_place.tolist()))
        yield Breakdown("place of the code in its word", tuple(parts))
        return
    if function == "unpack":
        yield _by_word(wrong, operands.dim, "place of the code in its word")
        return
    if function in WEIGHTS:
        yield from _of_weight(operands, wrong)
        return
    if operands.adapter_ids is not None and operands.adapter_ids.numel() == wrong.shape[0]:
        ids = operands.adapter_ids.long()
        present = sorted(set(ids.tolist()))
        names = ["no adapter (-1)" if each == -1 else f"adapter {each}" for each in present]
        yield _divided("adapter of the token", wrong, 0, ids, present, names)
    if function in ("shrink", "expand"):
        return
    if operands.topk_ids is not None and operands.topk_ids.shape[0] == wrong.shape[0]:
        yield _of_experts(operands.topk_ids.long(), wrong)
        return
    yield from _of_outputs(operands, wrong)


def _of_experts(ids: Tensor, wrong: Tensor) -> Breakdown:
    """Return the share of wrong elements of the tokens that use each expert."""
    parts = []
    for expert in sorted(set(ids.flatten().tolist())):
        rows = (ids == expert).any(dim=1)
        name = "a dropped slot (-1)" if expert == -1 else f"expert {expert}"
        parts.append(Part(name, float(wrong[rows].double().mean())))
    return Breakdown("expert of the token, each token under all that it uses", tuple(parts))


def _of_float4(weight: Float4Weight, wrong: Tensor) -> Iterator[Breakdown]:
    """Yield the divisions of an FP4 weight: by group, by nibble, and by the value of the code."""
    columns = torch.arange(weight.in_features)
    groups = list(range(weight.scale.shape[1]))
    names = [str(group) for group in groups]
    yield _divided("group", wrong, 1, columns // weight.group_size, groups, names)
    nibbles = ("the low nibble", "the high nibble")
    yield _divided("place of the code in its byte", wrong, 1, columns % 2, (0, 1), nibbles)
    codes = unpack_float4(weight.packed)
    parts = [
        Part(f"{E2M1[code]:+g}", float(wrong[codes == code].double().mean()))
        for code in sorted(set(codes.flatten().tolist()))
    ]
    yield Breakdown("value of the code", tuple(parts))


def _of_weight(operands: Operands, wrong: Tensor) -> Iterator[Breakdown]:
    if isinstance(operands.weight, Float4Weight):
        yield from _of_float4(operands.weight, wrong)
        return
    weight = operands.packed_weight
    if weight is None:
        return
    groups = list(range(weight.scale.shape[-1]))
    yield _divided("group", wrong, 1, scale_columns(weight), groups, [str(g) for g in groups])
    if isinstance(operands.layout, AWQTensors):
        yield _by_word(wrong, 0, "place of the output in its word")
        return
    yield _by_word(wrong, 1, "place of the code in its word")
    if weight.zero_point is not None and weight.zero_point.dtype == torch.int32:
        yield _by_word(wrong, 0, "place of the zero-point in its word")


def _of_outputs(operands: Operands, wrong: Tensor) -> Iterator[Breakdown]:
    weight = operands.packed_weight
    spans = [(part.start, part.stop) for part in operands.slices]
    if len(spans) > 1 or any(start for start, _ in spans):
        slot = torch.full((wrong.shape[1],), -1)
        for index, (start, stop) in enumerate(spans):
            slot[start:stop] = index
        present = sorted(set(slot.tolist()))
        names = [
            "outputs of no slice"
            if each == -1
            else f"slice {each} (outputs {spans[each][0]} to {spans[each][1] - 1})"
            for each in present
        ]
        yield _divided("slice", wrong, 1, slot, present, names)
    zero_point = None if weight is None else weight.zero_point
    if zero_point is not None and zero_point.dtype == torch.int32:
        yield _by_word(wrong, 1, "place of the output's zero-point in its word")


def _by_word(wrong: Tensor, dim: int, by: str) -> Breakdown:
    places = torch.arange(wrong.shape[dim]) % WORD
    present = list(range(min(WORD, wrong.shape[dim])))
    return _divided(by, wrong, dim, places, present, [str(place) for place in present])


def _divided(
    by: str, wrong: Tensor, dim: int, part_of: Tensor, present: Sequence[int], names: Sequence[str]
) -> Breakdown:
    """Return the share of wrong elements in each part of the positions along ``dim``."""
    parts = []
    for each, name in zip(present, names, strict=True):
        chosen = wrong.index_select(dim, (part_of == each).nonzero().flatten())
        if chosen.numel():
            parts.append(Part(name, float(chosen.double().mean())))
    return Breakdown(by, tuple(parts))
