"""The layer of our vLLM plug-in, as ``--quantization int4_lora`` runs it.

Adapters are written as vLLM writes them into slots: with the scaling multiplied into B, in the
dtype of B.

Source: ``int4_lora.integration.vllm_plugin.served_layer``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled import PreparedLoRA, PreparedWeight, formulation_for, prepare
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer, adapter_slots
from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight
from int4_lora.reference.conformance import Manifest
from int4_lora.reference.linear import as_slices

__all__ = ["VllmPlugin"]


class VllmPlugin:
    """``ServedLayer``, called as vLLM calls it."""

    manifest = Manifest(
        dtypes=(torch.float16, torch.bfloat16), weight_rounded=False, delta_rounded=True
    )

    def prepare(self, weight: PackedWeight) -> PreparedWeight:
        """Prepare a weight."""
        return prepare(weight)

    def prepare_lora(self, lora: LoRAStack | Sequence[LoRASlice]) -> PreparedLoRA:
        """Write adapters into slots as vLLM does."""
        slices = as_slices(lora)
        a = [part.stack.a.unsqueeze(1) for part in slices]
        b = [_scaled(part.stack).unsqueeze(1) for part in slices]
        prepared, views = adapter_slots(a, b)
        for view, values in zip(views, b, strict=True):
            view.copy_(values)
        pairs = zip(prepared.slices, slices, strict=True)
        return PreparedLoRA(  # vLLM's slices follow one another, the cases' may leave gaps
            tuple(dataclasses.replace(slot, start=part.start) for slot, part in pairs)
        )

    def declared(
        self, x: Tensor, weight: PreparedWeight, lora: PreparedLoRA | None
    ) -> dict[str, bool]:
        """Return the roundings of the formulation that a call uses."""
        chosen = formulation_for(weight, x.dtype, x.shape[0], lora)
        return {"weight_rounded": chosen.weight_rounded, "base_rounded": chosen.base_rounded}

    def int4_linear(self, x: Tensor, weight: PreparedWeight, bias: Tensor | None = None) -> Tensor:
        """Return the layer without adapters."""
        return _layer_with(weight).forward(x, None, bias)

    def int4_lora_linear(
        self,
        x: Tensor,
        weight: PreparedWeight,
        lora: PreparedLoRA | None = None,
        adapter_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return the layer with adapters."""
        layer = _layer_with(weight)
        if lora is None or adapter_ids is None:
            return layer.forward(x, None, bias)
        layer.lora = lora
        return layer.forward(x, adapter_ids.long(), bias)


def _scaled(stack: LoRAStack) -> Tensor:
    return stack.b * stack.scaling.to(stack.b.dtype)[:, None, None]


def _layer_with(weight: PreparedWeight) -> ServedLayer:
    return ServedLayer("layer", weight=weight)
