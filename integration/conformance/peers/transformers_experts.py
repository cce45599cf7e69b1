"""transformers' eager experts in float32, with the weights that PEFT gives them.

PEFT adds ``scaling B A`` of all experts to their dense weights. One pass has one adapter, so the
tokens of each adapter get a pass of their own.

Source: ``Qwen3MoeExperts`` in ``transformers/models/qwen3_moe/modeling_qwen3_moe.py``, version 5;
``ParamWrapper`` in ``peft/tuners/lora/layer.py``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from int4_lora.reference import ExpertsLoRA, ExpertsWeight, dequantize
from int4_lora.reference.conformance import Manifest
from int4_lora.reference.moe import Activation

__all__ = ["TransformersExperts"]

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


class TransformersExperts:
    """``Qwen3MoeExperts`` with ``experts_implementation="eager"``.

    Raises:
        ImportError: transformers is not installed, or has a linear for each projection of each
            expert, as before version 5.
    """

    manifest = Manifest()

    def __init__(self) -> None:
        self._config = importlib.import_module("transformers").Qwen3MoeConfig
        family = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        if not hasattr(family, "Qwen3MoeExperts"):
            raise ImportError("transformers before 5 has no module of all experts")
        self._kind = family.Qwen3MoeExperts

    def int4_moe(
        self,
        x: Tensor,
        experts: ExpertsWeight,
        topk_ids: Tensor,
        topk_weights: Tensor,
        lora: ExpertsLoRA | None = None,
        adapter_ids: Tensor | None = None,
        *,
        activation: Activation = "silu",
        weights_first: bool = False,
    ) -> Tensor:
        """Return the sum of each token's experts, rounded once."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        ids = torch.full((len(x),), -1) if adapter_ids is None else adapter_ids
        for adapter in sorted(set(ids.tolist())):
            chosen = ids == adapter
            module = self._module(experts, lora, adapter, activation)
            wide, p = x[chosen].float(), topk_weights[chosen].float()
            routed = topk_ids[chosen].long()
            routed = torch.where(routed < 0, experts.count, routed)  # its mark for no expert
            if weights_first:  # each pair of a token and an expert is a token
                rows = (p.unsqueeze(2) * wide.unsqueeze(1)).flatten(0, 1)
                results = module(rows, routed.view(-1, 1), torch.ones_like(rows[:, :1]))
                total[chosen] = results.view(*routed.shape, -1).sum(1)
            else:
                total[chosen] = module(wide, routed, p)
        return total.to(x.dtype)

    def _module(
        self,
        experts: ExpertsWeight,
        lora: ExpertsLoRA | None,
        adapter: int,
        activation: Activation,
    ) -> nn.Module:
        """Return transformers' module with the weights of one adapter, or of none for -1."""
        config: Any = self._config(
            hidden_size=experts.hidden,
            moe_intermediate_size=experts.inter,
            num_experts=experts.count,
            hidden_act=ACTIVATIONS[activation],
            experts_implementation="eager",
        )
        with torch.device("meta"):
            module: nn.Module = self._kind(config)
        for name in ("gate_up", "down"):
            dense = torch.stack(
                [dequantize(weight, torch.float32) for weight in getattr(experts, name)]
            )
            if lora is not None and adapter >= 0:
                for expert, weight in enumerate(dense):
                    for part in lora.slices(name, expert):
                        a, b = part.stack.a[adapter].float(), part.stack.b[adapter].float()
                        weight[part.start : part.stop] += part.stack.scaling[adapter] * (b @ a)
            setattr(module, f"{name}_proj", nn.Parameter(dense, requires_grad=False))
        return module
