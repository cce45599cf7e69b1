"""The reference's definition through ``torch.compile``: fused kernels on prepared operands.

Start at ``linear.py``; ``formulations/`` holds the ways to compute the layer, each with the
roundings that it declares. ``compiled`` imports ``reference``, never the other way round.

Source: ``docs/compiled.md``.
"""

from int4_lora.compiled.adapters.addition import add_lora
from int4_lora.compiled.adapters.prepared import PreparedLoRA
from int4_lora.compiled.graphs.artifacts import load_artifacts, save_artifacts
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.linear import formulation_for, int4_linear, int4_lora_linear
from int4_lora.compiled.moe import int4_moe
from int4_lora.compiled.preparation import layouts, prepare, prepare_lora
from int4_lora.compiled.prepared_experts import (
    PreparedExperts,
    PreparedExpertsLoRA,
    prepare_experts,
    prepare_experts_lora,
)

__all__ = [
    "PreparedExperts",
    "PreparedExpertsLoRA",
    "PreparedLoRA",
    "PreparedWeight",
    "add_lora",
    "formulation_for",
    "int4_linear",
    "int4_lora_linear",
    "int4_moe",
    "layouts",
    "load_artifacts",
    "prepare",
    "prepare_experts",
    "prepare_experts_lora",
    "prepare_lora",
    "save_artifacts",
]
