"""Bring the pairs of experts into the form in which they are written.

separate: one pair for each projection of each expert, ``experts.<e>.gate_proj`` and so on. vLLM
reads it for most models, and so does PEFT where the model has a linear layer for each; PEFT 0.21 on
transformers 5 converts it for the families of Mixtral and Qwen2-MoE, which covers Qwen3-MoE and
DeepSeek-V3.

fused: one pair for all experts of a parameter, ``target_parameters``. PEFT from 0.19 reads it where
the model holds experts as parameters, as transformers 5 does; vLLM for models that it holds so too,
such as gpt-oss and Qwen3-VL-MoE, and for others with ``--enable-mixed-moe-lora-format``.

Source: ``peft/utils/transformers_weight_conversion.py``; ``LoRAModelManager`` in
``vllm/lora/model_manager.py`` of vLLM 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import AdapterModule
from int4_lora.integration.adapter.experts import DOWN, GATE_UP

__all__ = ["Experts", "fused_experts", "named_experts", "owner_of", "separate_experts"]

Experts = Literal["separate", "fused"]

EXPERT = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<part>[^.]+)")
GATE, UP = "gate_proj", "up_proj"
ByPart = dict[str, dict[int, AdapterModule]]  # the pairs of a module's experts


def named_experts(modules: Mapping[str, AdapterModule]) -> dict[str, ByPart]:
    """Return the pairs of experts, by the module that holds them, by projection and by expert.

    Args:
        modules: the pairs of an adapter.

    Example:
        >>> pair = AdapterModule(torch.ones(1, 2), torch.ones(2, 1), 1.0)
        >>> found = named_experts({"mlp.experts.0.up_proj": pair, "q_proj": pair})
        >>> [*found], [*found["mlp.experts"]]
        (['mlp.experts'], ['up_proj'])
    """
    found: dict[str, ByPart] = {}
    for name, module in modules.items():
        if match := EXPERT.fullmatch(name):
            parts = found.setdefault(match["owner"], {})
            parts.setdefault(match["part"], {})[int(match["expert"])] = module
    return found


def owner_of(name: str) -> str | None:
    """Return the module that holds the expert whose projection is ``name``; None for others.

    Example:
        >>> owner_of("model.layers.0.mlp.experts.3.up_proj")
        'model.layers.0.mlp.experts'
    """
    match = EXPERT.fullmatch(name)
    return match["owner"] if match else None


def separate_experts(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """Return an adapter's pairs with ``gate_up_proj`` of each expert split into gate and up.

    Args:
        modules: the pairs of an adapter. Of ``gate_up_proj``, the first half of the rows is gate.

    Raises:
        ValueError: ``gate_up_proj`` has an odd number of rows, or the expert has a pair of a part
            too.
    """
    found = dict(modules)
    for owner, parts in named_experts(modules).items():
        for expert, module in parts.get(GATE_UP, {}).items():
            name, rows = f"{owner}.{expert}", module.b.shape[0]
            if rows % 2 or any(expert in parts.get(part, {}) for part in (GATE, UP)):
                raise ValueError(
                    f"{name}: {GATE_UP} of {rows} rows cannot be split into {GATE} and {UP} beside "
                    f"{sorted(parts)}"
                )
            del found[f"{name}.{GATE_UP}"]
            for part, b in zip((GATE, UP), module.b.chunk(2), strict=True):
                found[f"{name}.{part}"] = AdapterModule(module.a, b, module.scaling)
    return found


def fused_experts(owner: str, parts: ByPart) -> dict[str, AdapterModule]:
    """Return one pair for all experts of each parameter of a module.

    Args:
        owner: the module's name, for messages.
        parts: the pairs of its experts: of ``gate_up_proj``, or of ``gate_proj`` and ``up_proj``,
            and of ``down_proj``.

    Returns:
        The pairs of ``gate_up_proj`` and ``down_proj``: A ``[experts * rank, in]`` and B
        ``[out, rank * experts]`` in PEFT's order.

    Raises:
        ValueError: an expert has no pair of a projection, or ranks, shapes, dtypes or scalings
            differ between experts, or a projection has another name.
    """
    found: dict[str, AdapterModule] = {}
    unknown = {*parts} - {GATE_UP, GATE, UP, DOWN}
    if unknown or (GATE_UP in parts and {GATE, UP} & {*parts}):
        raise ValueError(f"{owner}: {sorted(parts)} cannot be fused into {GATE_UP} and {DOWN}")
    count = 1 + max(expert for experts in parts.values() for expert in experts)
    for part, experts in parts.items():
        if len(experts) < count:
            missing = next(expert for expert in range(count) if expert not in experts)
            raise ValueError(f"{owner}: expert {missing} has no pair of {part}, others have")
    if (GATE in parts) != (UP in parts):
        raise ValueError(f"{owner}: {GATE} and {UP} can only be fused if both have pairs")
    ordered = {
        part: [experts[expert] for expert in range(count)] for part, experts in parts.items()
    }
    if GATE in ordered:
        pairs = zip(ordered.pop(GATE), ordered.pop(UP), strict=True)
        ordered[GATE_UP] = [_joined(owner, gate, up) for gate, up in pairs]
    for name, modules in sorted(ordered.items()):
        found[name] = _for_all(f"{owner}.{name}", modules)
    return found


def _joined(owner: str, gate: AdapterModule, up: AdapterModule) -> AdapterModule:
    """Return the pair of gate and up: A shared if it is the same, else B block by block."""
    if gate.scaling != up.scaling or gate.a.dtype != up.a.dtype:
        raise ValueError(f"{owner}: {GATE} and {UP} must have one scaling and dtype to be fused")
    if torch.equal(gate.a, up.a):
        return AdapterModule(gate.a, torch.cat([gate.b, up.b]), gate.scaling)
    b = gate.b.new_zeros(gate.b.shape[0] + up.b.shape[0], gate.b.shape[1] + up.b.shape[1])
    b[: gate.b.shape[0], : gate.b.shape[1]] = gate.b
    b[gate.b.shape[0] :, gate.b.shape[1] :] = up.b
    return AdapterModule(torch.cat([gate.a, up.a]), b, gate.scaling)


def _for_all(where: str, modules: Sequence[AdapterModule]) -> AdapterModule:
    """Return the pair for all experts, in PEFT's order of rows and columns."""
    kinds = {
        (tuple(one.a.shape), tuple(one.b.shape), str(one.a.dtype), float(one.scaling))
        for one in modules
    }
    if len(kinds) > 1:
        shown = [f"A {a}, B {b}, {dtype}, {scaling}" for a, b, dtype, scaling in sorted(kinds)]
        rule = "all experts must have pairs of one shape, dtype and scaling to be fused"
        raise ValueError(f"{where}: {rule}, got {shown[0]} and {shown[1]}")
    a = torch.cat([one.a for one in modules])
    b: Tensor = torch.stack([one.b for one in modules], dim=2)  # [out, rank, experts]
    return AdapterModule(a, b.flatten(1), modules[0].scaling)
