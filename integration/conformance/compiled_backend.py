"""``int4_lora.compiled`` as a backend: each call declares the roundings of its formulation.

Source: ``docs/compiled.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled import (
    PreparedExperts,
    PreparedExpertsLoRA,
    PreparedLoRA,
    PreparedWeight,
    formulation_for,
    int4_linear,
    int4_lora_linear,
    int4_moe,
    prepare,
    prepare_experts,
    prepare_experts_lora,
    prepare_lora,
)
from int4_lora.reference.conformance import Manifest

__all__ = ["CompiledBackend"]


class CompiledBackend:
    """The compiled layers, which declare the flags of the formulation of each call."""

    manifest = Manifest(
        formats=("int4", "nvfp4", "mxfp4"),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        weight_rounded=False,
    )

    int4_linear = staticmethod(int4_linear)
    int4_lora_linear = staticmethod(int4_lora_linear)
    int4_moe = staticmethod(int4_moe)
    prepare = staticmethod(prepare)
    prepare_lora = staticmethod(prepare_lora)
    prepare_experts = staticmethod(prepare_experts)
    prepare_experts_lora = staticmethod(prepare_experts_lora)

    def declared(
        self, x: Tensor, weight: PreparedWeight, lora: PreparedLoRA | None
    ) -> dict[str, bool]:
        """Return the roundings of the formulation that a call uses."""
        chosen = formulation_for(weight, x.dtype, x.shape[0], lora)
        return {
            "weight_rounded": chosen.weight_rounded,
            "base_rounded": chosen.base_rounded,
        }

    def declared_experts(
        self, x: Tensor, experts: PreparedExperts, lora: PreparedExpertsLoRA | None
    ) -> dict[str, bool]:
        """Return the roundings of all calls of ``int4_moe``."""
        return {"weight_rounded": False, "steps_rounded": True}
