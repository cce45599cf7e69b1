"""Stack the adapters of one layer's experts, as ``int4_moe`` takes them.

``read_adapter`` reads PEFT's pair for all experts (``target_parameters``) and its pair for each
projection of each expert alike, and ``fit_adapter`` gives both the names of the base. What is left
is a pair, or none, for gate, up and down of each expert.

Source: ``docs/adapters.md``; ``docs/numerics.md``, "Experts".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from int4_lora.integration.adapter.adapter import Adapter
from int4_lora.integration.adapter.stack import stack_adapters
from int4_lora.integration.checkpoint.experts import ExpertNames
from int4_lora.reference import ExpertsLoRA, LoRASlice, LoRAStack
from int4_lora.reference.experts import ExpertLoRA

__all__ = ["stack_expert_adapters"]


def stack_expert_adapters(
    adapters: Sequence[Adapter], names: ExpertNames, hidden: int, inter: int
) -> ExpertsLoRA | None:
    """Stack several adapters for the experts of a layer; an id is a position in ``adapters``.

    An adapter that does not change a projection of an expert adds zero there.

    Args:
        adapters: the adapters, under the names of the base: see ``fit_adapter``.
        names: the experts, from ``stored_experts``.
        hidden: the width of x.
        inter: the width between up and down.

    Returns:
        The adapters of all experts, or None if no adapter changes any.

    Raises:
        ValueError: an adapter's shapes do not fit, it has pairs for experts that the base lacks, or
            for all experts of a parameter, but of another number; the message names both.

    Example:
        >>> adapters = [fit_adapter(read_adapter("sql-lora"), checkpoint)]  # doctest: +SKIP
        >>> names = stored_experts(checkpoint.modules())[owner]  # doctest: +SKIP
        >>> lora = stack_expert_adapters(adapters, names, 2048, 768)  # doctest: +SKIP

    Source:
        ``int4_lora.reference.ExpertsLoRA``.
    """
    for adapter in adapters:
        _check_experts(adapter, names)
    gate_ups: list[ExpertLoRA] = []
    downs: list[ExpertLoRA] = []
    for expert in range(names.count):
        gate_name, up_name, down_name = names.of(expert)
        gate = stack_adapters(adapters, gate_name, hidden, inter)
        up = stack_adapters(adapters, up_name, hidden, inter)
        gate_ups.append(_gate_up(gate, up, inter))
        downs.append(stack_adapters(adapters, down_name, inter, hidden))
    gate_up = gate_ups if any(entry is not None for entry in gate_ups) else None
    down = downs if any(entry is not None for entry in downs) else None
    return None if gate_up is None and down is None else ExpertsLoRA(gate_up, down)


def _gate_up(gate: LoRAStack | None, up: LoRAStack | None, inter: int) -> ExpertLoRA:
    """Return the adapters of gate and up, as one stack where they share A."""
    if gate is None and up is None:
        return None
    if gate is not None and up is not None and _share_a(gate, up):
        return LoRAStack(gate.a, torch.cat([gate.b, up.b], dim=1), gate.scaling)
    given = ((gate, 0), (up, inter))
    return [LoRASlice(stack, start) for stack, start in given if stack is not None]


def _share_a(gate: LoRAStack, up: LoRAStack) -> bool:
    """Return whether gate and up have the same A, as pairs of ``gate_up_proj`` do."""
    return (
        gate.a.dtype == up.a.dtype
        and torch.equal(gate.a, up.a)
        and torch.equal(gate.scaling, up.scaling)
    )


def _check_experts(adapter: Adapter, names: ExpertNames) -> None:
    """Check that an adapter's pairs are for experts of the base, and of a parameter for all."""
    prefix, numbers = f"{names.owner}.", set()
    for name in adapter.modules:
        expert, _, part = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and part and expert.isdecimal():
            numbers.add(int(expert))
    if not numbers:
        return
    highest = max(numbers)
    if highest >= names.count:
        raise ValueError(
            f"{adapter.path}: {names.owner}: the adapter has a pair for expert {highest}, the base "
            f"has {names.count} experts"
        )
    if adapter.config.get("target_parameters") and len(numbers) < names.count:
        raise ValueError(
            f"{adapter.path}: {names.owner}: target_parameters gives every expert a pair, the "
            f"adapter has pairs for {len(numbers)} of the {names.count} experts of the base"
        )
