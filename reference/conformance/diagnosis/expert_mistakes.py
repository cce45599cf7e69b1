"""The mistakes that code of INT4 experts with adapters has had, each as other operands.

A backend that makes a mistake returns the right answer for the operands that ``change`` returns.

Source: ``docs/conformance.md``, which says what each means; for ``shared_order`` the layout of
PEFT's ``target_parameters``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from int4_lora.reference import ExpertsLoRA, ExpertsWeight, LoRASlice, LoRAStack, PackedWeight
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.diagnosis.definition_steps import AnswerOfWay
from int4_lora.reference.conformance.judging.answers import answer
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.lora_stack import rows_of

__all__ = ["EXPERT_MISTAKES", "ExpertMistake", "answer_with"]


@dataclass(frozen=True)
class ExpertMistake:
    """A mistake made in one way.

    Args:
        name: one of ``IDENTIFIERS``.
        variant: what exactly is done, in words.
        change: (operands, ids of an earlier call or None) -> the operands whose right answer the
            backend returns, or None where the mistake cannot be made.
    """

    name: str
    variant: str
    change: Callable[[Operands, Tensor | None], Operands | None]


def answer_with(
    mistake: ExpertMistake, operands: Operands, manifest: Manifest, earlier_ids: Tensor | None
) -> AnswerOfWay | None:
    """Return the answer of a backend that makes a mistake, or None where it cannot be made.

    Args:
        mistake: the mistake.
        operands: the arguments of ``int4_moe``, on the CPU.
        manifest: the declared roundings.
        earlier_ids: the adapter ids of an earlier call, or None.
    """
    changed = mistake.change(operands, earlier_ids)
    if changed is None:
        return None
    held = answer("int4_moe", changed, manifest)
    return AnswerOfWay(held.exact, held.bound)


def _without(gate_up: bool, down: bool) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change that drops the adapters of layers."""

    def change(operands: Operands, earlier: Tensor | None) -> Operands | None:
        lora = operands.experts_lora
        if lora is None:
            return None
        kept = ExpertsLoRA(None if gate_up else lora.gate_up, None if down else lora.down)
        ids = operands.adapter_ids if kept.adapters else None
        return replace(operands, experts_lora=kept if kept.adapters else None, adapter_ids=ids)

    return change


Regather = Callable[[Tensor, int, int], Tensor]


def _stacks_regathered(
    regather: Regather,
) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change that takes each expert's adapters from other places of all of them.

    ``regather`` gets int64 ``[experts, adapters]`` that counts the pairs, experts first, and
    returns which pair is used at each place.
    """

    def change(operands: Operands, earlier: Tensor | None) -> Operands | None:
        changed = {}
        for name, stacks in _whole_stacks(operands):
            experts, adapters = len(stacks), stacks[0].adapters
            pairs = torch.arange(experts * adapters).reshape(experts, adapters)
            used = regather(pairs, experts, adapters)
            parts = {
                field: torch.stack([getattr(stack, field) for stack in stacks]).flatten(0, 1)[used]
                for field in ("a", "b", "scaling")
            }
            changed[name] = [
                LoRAStack(*(parts[field][expert] for field in ("a", "b", "scaling")))
                for expert in range(experts)
            ]
        return _with_lora(operands, changed)

    return change


def _shared_order(side: str) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change that reads one side of the pair for all experts in the other side's order.

    PEFT stores A with the rows of an expert together, and B with the columns of a rank together.
    """

    def change(operands: Operands, earlier: Tensor | None) -> Operands | None:
        changed = {}
        for name, stacks in _whole_stacks(operands):
            tensors = torch.stack([getattr(stack, side) for stack in stacks])
            by_rank = tensors if side == "a" else tensors.transpose(2, 3)  # [.., rank, width]
            read = by_rank.clone()
            for adapter, rank in enumerate(_ranks(stacks)):
                pairs = by_rank[:, adapter, :rank]  # [experts, rank, width]
                experts, width = pairs.shape[0], pairs.shape[2]
                if side == "a":
                    other = pairs.reshape(rank, experts, width).transpose(0, 1)
                else:
                    other = pairs.transpose(0, 1).reshape(experts, rank, width)
                read[:, adapter, :rank] = other
            read = read if side == "a" else read.transpose(2, 3)
            changed[name] = [
                dataclasses.replace(stack, **{side: read[expert]})
                for expert, stack in enumerate(stacks)
            ]
        return _with_lora(operands, changed)

    return change


def _whole_stacks(operands: Operands) -> Iterator[tuple[str, list[LoRAStack]]]:
    """Yield the layers whose experts have LoRAStacks of one shape; zeros for those without any."""
    lora = operands.experts_lora
    for name in ("gate_up", "down"):
        entries = (lora and getattr(lora, name)) or ()
        stacks = [entry for entry in entries if isinstance(entry, LoRAStack)]
        if stacks and len({stack.a.shape for stack in stacks}) == 1:
            first = stacks[0]
            zeros = LoRAStack(0 * first.a, 0 * first.b, 0 * first.scaling)
            if all(entry is None or isinstance(entry, LoRAStack) for entry in entries):
                yield name, [zeros if entry is None else entry for entry in entries]


def _ranks(stacks: list[LoRAStack]) -> list[int]:
    """Return the rank of each adapter without the rows that only pad it."""
    used = torch.stack([stack.a.double().abs().amax(dim=2) for stack in stacks]).amax(dim=0)
    return [int(row.nonzero().max()) + 1 if bool(row.any()) else 1 for row in used]


def _with_lora(operands: Operands, changed: dict[str, list[LoRAStack]]) -> Operands | None:
    lora = operands.experts_lora
    if lora is None or not changed:
        return None
    layers = {name: changed.get(name, getattr(lora, name)) for name in ("gate_up", "down")}
    return replace(operands, experts_lora=ExpertsLoRA(**layers))


def _rows_reordered(
    order: Callable[[int], Tensor], *, weights: bool = True, lora: bool = True
) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change of the rows of gate_up; ``order`` gets inter."""

    def change(operands: Operands, earlier: Tensor | None) -> Operands | None:
        experts, given = operands.experts, operands.experts_lora
        if experts is None or isinstance(experts.gate_up[0].group_size, tuple):
            return None
        index = order(experts.inter)
        if weights:
            gate_up = [weight.rows(index) for weight in experts.gate_up]
            operands = replace(operands, experts=ExpertsWeight(gate_up, experts.down))
        if not lora or given is None or given.gate_up is None:
            return operands if weights else None
        slices: list[list[LoRASlice]] = [
            rows_of(given.slices("gate_up", expert), index) for expert in range(experts.count)
        ]
        return replace(operands, experts_lora=ExpertsLoRA(slices, given.down))

    return change


def _halves_swapped(inter: int) -> Tensor:
    return torch.arange(2 * inter).roll(inter)


def _alternating(inter: int) -> Tensor:
    """Return even rows for the gate, odd rows for up."""
    return torch.cat([torch.arange(0, 2 * inter, 2), torch.arange(1, 2 * inter, 2)])


def _weights_first(operands: Operands, earlier: Tensor | None) -> Operands | None:
    return replace(operands, weights_first=not operands.weights_first)


def _weights(
    change: Callable[[Tensor], Tensor],
) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change of the routed weights."""

    def changed(operands: Operands, earlier: Tensor | None) -> Operands | None:
        p = operands.topk_weights
        return None if p is None else replace(operands, topk_weights=change(p))

    return changed


def _normalised(p: Tensor) -> Tensor:
    return (p.double() / p.double().sum(dim=1, keepdim=True)).to(p.dtype)


def _ids(
    change: Callable[[Tensor, int], Tensor],
) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change of the expert ids; it gets the number of experts."""

    def changed(operands: Operands, earlier: Tensor | None) -> Operands | None:
        ids, experts = operands.topk_ids, operands.experts
        if ids is None or experts is None:
            return None
        return replace(operands, topk_ids=change(ids, experts.count))

    return changed


def _once(ids: Tensor, experts: int) -> Tensor:
    """Drop the earlier of two slots with the same expert."""
    kept = ids.clone()
    for slot in range(ids.shape[1]):
        again = (ids[:, slot + 1 :] == ids[:, slot : slot + 1]).any(dim=1)
        kept[again, slot] = -1
    return kept


def _adapter_ids(
    change: Callable[[Tensor, int], Tensor],
) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change of the adapter ids; it gets the number of adapters."""

    def changed(operands: Operands, earlier: Tensor | None) -> Operands | None:
        ids, lora = operands.adapter_ids, operands.experts_lora
        if ids is None or lora is None:
            return None
        return replace(operands, adapter_ids=change(ids, lora.adapters))

    return changed


def _earlier(operands: Operands, earlier: Tensor | None) -> Operands | None:
    ids, lora = operands.adapter_ids, operands.experts_lora
    if earlier is None or ids is None or lora is None or earlier.shape != ids.shape:
        return None
    in_range = torch.where(earlier < lora.adapters, earlier.clamp(min=-1), -1)
    return replace(operands, adapter_ids=in_range)


def _scalings(
    change: Callable[[Tensor], Tensor],
) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change of the scalings."""

    def changed(operands: Operands, earlier: Tensor | None) -> Operands | None:
        lora = operands.experts_lora
        if lora is None:
            return None

        def scaled(name: str) -> list[list[LoRASlice]] | None:
            if getattr(lora, name) is None:
                return None
            return [
                [
                    LoRASlice(
                        dataclasses.replace(part.stack, scaling=change(part.stack.scaling)),
                        part.start,
                    )
                    for part in lora.slices(name, expert)
                ]
                for expert in range(lora.count)
            ]

        return replace(operands, experts_lora=ExpertsLoRA(scaled("gate_up"), scaled("down")))

    return changed


def _all_weights(
    change: Callable[[PackedWeight], PackedWeight],
) -> Callable[[Operands, Tensor | None], Operands | None]:
    """Return a change of every weight."""

    def changed(operands: Operands, earlier: Tensor | None) -> Operands | None:
        experts = operands.experts
        if experts is None:
            return None
        layers = ([change(weight) for weight in layer] for layer in (experts.gate_up, experts.down))
        return replace(operands, experts=ExpertsWeight(*layers))

    return changed


def _nibbles_reversed(weight: PackedWeight) -> PackedWeight:
    shifts = 4 * torch.arange(8, dtype=torch.int32)
    codes = (weight.packed.long()[..., None] >> shifts) & 0xF
    words = (codes.flip(-1) << shifts.long()).sum(dim=-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return dataclasses.replace(weight, packed=words)


def _groups_reversed(weight: PackedWeight) -> PackedWeight:
    return dataclasses.replace(weight, scale=weight.scale.flip(-1))


def _g_idx_ignored(weight: PackedWeight) -> PackedWeight:
    return dataclasses.replace(weight, g_idx=None)


EXPERT_MISTAKES: tuple[ExpertMistake, ...] = (
    ExpertMistake("nibble_order", "the first code in the highest bits",
                  _all_weights(_nibbles_reversed)),
    ExpertMistake("groups_reversed", "the last group first", _all_weights(_groups_reversed)),
    ExpertMistake("g_idx_ignored", "groups in column order", _all_weights(_g_idx_ignored)),
    ExpertMistake("adapter_minus_one_indexed", "the last adapter",
                  _adapter_ids(lambda ids, count: torch.where(ids < 0, count - 1, ids))),
    ExpertMistake("adapter_minus_one_indexed", "the first adapter",
                  _adapter_ids(lambda ids, count: ids.clamp(min=0))),
    ExpertMistake("scaling_missing", "1", _scalings(torch.ones_like)),
    ExpertMistake("scaling_twice", "squared", _scalings(torch.square)),
    ExpertMistake("stale_adapter_ids", "those of the call before", _earlier),
    ExpertMistake("expert_adapters_dropped", "of all layers", _without(True, True)),
    ExpertMistake("expert_adapters_dropped", "of gate and up", _without(True, False)),
    ExpertMistake("expert_adapters_dropped", "of down", _without(False, True)),
    ExpertMistake("expert_and_adapter_swapped", "expert + adapter * experts, experts first",
                  _stacks_regathered(lambda pairs, experts, adapters: pairs.flatten()[
                      torch.arange(experts)[:, None] + torch.arange(adapters) * experts])),
    ExpertMistake("expert_and_adapter_swapped", "adapter + expert * adapters, adapters first",
                  _stacks_regathered(lambda pairs, experts, adapters: pairs.T.flatten()[
                      torch.arange(experts)[:, None] * adapters + torch.arange(adapters)])),
    ExpertMistake("gate_up_swapped", "up is activated", _rows_reordered(_halves_swapped)),
    ExpertMistake("gate_up_swapped", "of the weight, not of the adapters",
                  _rows_reordered(_halves_swapped, lora=False)),
    ExpertMistake("gate_up_swapped", "of the adapters, not of the weight",
                  _rows_reordered(_halves_swapped, weights=False)),
    ExpertMistake("gate_up_swapped", "rows taken in turn", _rows_reordered(_alternating)),
    ExpertMistake("weights_before_activation", "x multiplied, or not, against weights_first",
                  _weights_first),
    ExpertMistake("routed_weight_missing", "1", _weights(torch.ones_like)),
    ExpertMistake("routed_weight_missing", "divided by their sum", _weights(_normalised)),
    ExpertMistake("shared_order", "columns of B by expert", _shared_order("b")),
    ExpertMistake("shared_order", "rows of A by rank", _shared_order("a")),
    ExpertMistake("dropped_expert_indexed", "the last expert",
                  _ids(lambda ids, experts: torch.where(ids < 0, experts - 1, ids))),
    ExpertMistake("dropped_expert_indexed", "the first expert",
                  _ids(lambda ids, experts: ids.clamp(min=0))),
    ExpertMistake("repeated_expert_once", "the last of its slots counts", _ids(_once)),
)  # fmt: skip
"""Every variant, in the order in which they are tried."""
