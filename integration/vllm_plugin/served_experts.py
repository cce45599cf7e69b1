"""The plug-in's state of the experts of one layer, and their arithmetic.

vLLM's ``RoutedExperts`` hold it as ``layer.int4_lora``. ``int4_lora.compiled`` computes them. Where
it fails the check at load, the reference does, slowly: on a CPU without AMX, vLLM has no kernel to
fall back to.

Source: vLLM's ``FusedMoEWithLoRA`` for the layout of the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from int4_lora.compiled import (
    PreparedExperts,
    PreparedExpertsLoRA,
    PreparedLoRA,
    PreparedWeight,
    int4_moe,
)
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.integration.vllm_plugin.load_check import (
    fault_of_addition,
    fault_of_experts,
    fault_of_layer,
    graph_key_of_layer,
)
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.slot_ranks import (
    SlotRanks,
    at_rank,
    narrower_ranks,
    slices_of,
)
from int4_lora.reference import ExpertsWeight
from int4_lora.reference import int4_moe as definition
from int4_lora.reference.moe import Activation

__all__ = ["ServedExperts", "expert_slots"]


@dataclass(eq=False)
class ServedExperts:
    """All that the plug-in knows of the experts of one layer.

    Args:
        name: the layer's full name in vLLM's model.
        engine: what all layers of the engine share.
        int4: whether the checkpoint has weights for them that our kernels take.
        fallback_reason: why ``int4_lora.compiled`` does not compute them, or None while it does.
        activation: between gate_up and down.
        top_k: how many experts a token has.
        scale_dtypes: of the checkpoint's scales, as they were loaded.
        loaded: whether the weights have been loaded.
        weight: the experts, laid out for our kernels.
        plain: the checkpoint's tensors, where the reference computes the experts.
        slots: the slots of the adapters; None while the engine serves none on experts.
        lora_fallback_reason: why the reference computes the experts with adapters, or None.
    """

    name: str
    engine: ServedEngine = field(default_factory=ServedEngine)
    int4: bool = False
    fallback_reason: str | None = "no INT4 weights"
    activation: Activation = "silu"
    top_k: int = 1
    scale_dtypes: set[torch.dtype] = field(default_factory=set)
    loaded: bool = False
    weight: PreparedExperts | None = None
    plain: ExpertsWeight | None = None
    slots: SlotRanks[PreparedExpertsLoRA] | None = None
    lora_fallback_reason: str | None = None

    @property
    def name_in_graph(self) -> str:
        """The name by which the operator of ``layer_operator`` finds it, beside vLLM's layers."""
        return f"{self.name}.int4_lora"

    @property
    def hidden(self) -> int:
        """The width of x and of y."""
        held = self.weight or self.plain
        assert held is not None
        return held.hidden

    def hold(self, weight: PreparedExperts) -> None:
        """Take the weights of all experts."""
        self.weight, self.fallback_reason = weight, None
        self.engine.forward_context[self.name_in_graph] = self

    def compute_plainly(self, plain: ExpertsWeight) -> None:
        """Let the reference compute the experts, with the checkpoint's tensors."""
        self.weight, self.plain = None, plain
        self.engine.forward_context[self.name_in_graph] = self

    def forward(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, adapter_ids: Tensor | None
    ) -> Tensor:
        """Return the sum of each token's experts, with its adapter.

        Args:
            x: ``[tokens, hidden]``.
            topk_ids: int ``[tokens, k]``.
            topk_weights: ``[tokens, k]``; the results of the experts are multiplied by them.
            adapter_ids: int64 ``[tokens]``, an id that is no slot for no adapter; or None for none.
        """
        slots = None if adapter_ids is None else self.slots
        lora = None
        if slots is not None and adapter_ids is not None:
            lora = slots.of_batch(adapter_ids)
        ids = None if lora is None else adapter_ids
        if self.weight is not None:
            return int4_moe(
                x, self.weight, topk_ids, topk_weights, lora, ids, activation=self.activation
            )
        assert self.plain is not None
        if lora is not None and ids is not None:
            ids = torch.where(ids < lora.adapters, ids, -1)
        return definition(
            x,
            self.plain,
            topk_ids,
            topk_weights,
            None if lora is None else lora.experts_lora(),
            ids,
            activation=self.activation,
        )

    def fault(self, experts: ExpertsWeight, weight: PreparedExperts) -> str | None:
        """Return what is wrong with experts that our code computes, or None.

        Both layers of an expert are checked with each graph that computes them, and a whole layer
        of experts once.

        Args:
            experts: the checkpoint's tensors.
            weight: the same, laid out.
        """
        for name in ("gate_up", "down"):
            both = zip(getattr(weight, name), getattr(experts, name), strict=True)
            for expert, (laid_out, packed) in enumerate(both):
                if not laid_out.holds(packed):
                    return f"the layout of {name} of expert {expert} does not give its bits back"
        for name in ("gate_up", "down"):
            fault = self._layer_fault(name, experts, getattr(weight, name)[0])
            if fault is not None:
                return fault
        return self.engine.fault_of_kind(
            ("experts", _signature(weight), self.activation),
            self.name,
            lambda tokens: tokens == 1,  # one token's experts have graphs of their own
            lambda tokens: fault_of_experts(
                weight, self.engine.dtype, tokens, self.top_k, self.activation
            ),
        )

    def _layer_fault(self, name: str, experts: ExpertsWeight, weight: PreparedWeight) -> str | None:
        packed, dtype = getattr(experts, name)[0], self.engine.dtype
        return self.engine.fault_of_kind(
            ("base", weight.signature, True),
            f"{name} of the experts of {self.name}",
            lambda tokens: graph_key_of_layer(weight, dtype, tokens),
            lambda tokens: fault_of_layer(packed, weight, dtype, tokens),
        )

    def read_slots(self, whole: PreparedExpertsLoRA) -> None:
        """Read the slots at the ranks of each batch's adapters, if these are computed right.

        Without warm-up, only whole slots are read: their graphs are all that requests may wait for.

        Args:
            whole: the slots at their whole rank.
        """
        ranks = narrower_ranks(slices_of(whole)[0].rank) if self.engine.options.warm_up else []
        narrower = [_at_rank(whole, rank) for rank in ranks]
        if self.weight is not None:
            narrower = [lora for lora in narrower if self.adapters_fault(lora) is None]
            self.lora_fallback_reason = self.adapters_fault(whole)
        self.slots = SlotRanks(whole, narrower)
        if self.weight is not None and self.lora_fallback_reason is not None:
            self.compute_plainly(self.weight.experts_weight())

    def adapters_fault(self, lora: PreparedExpertsLoRA) -> str | None:
        """Return what is wrong with the adapters of experts, or None.

        Args:
            lora: the slots, at the rank at which they are read.
        """
        weight, dtype = self.weight, self.engine.dtype
        assert weight is not None
        for part, outputs in ((lora.gate_up, 2 * weight.inter), (lora.down, weight.hidden)):
            assert part is not None
            fault = self._addition_fault(part, outputs)
            if fault is not None:
                return fault
        signatures = tuple(part.signature for part in slices_of(lora))
        return self.engine.fault_of_kind(
            ("experts", _signature(weight), self.activation, signatures),
            f"{self.name} with adapters of rank {slices_of(lora)[0].rank}",
            lambda tokens: tokens == 1,
            lambda tokens: fault_of_experts(
                weight, dtype, tokens, self.top_k, self.activation, lora
            ),
        )

    def _addition_fault(self, lora: PreparedLoRA, outputs: int) -> str | None:
        dtype, device = self.engine.dtype, lora.slices[0].a.device.type
        return self.engine.fault_of_kind(
            ("added", outputs, tuple(part.signature for part in lora.slices)),
            f"adapters of rank {lora.slices[0].rank} on the experts of {self.name}",
            lambda rows: bucket_of(rows, device),
            lambda rows: fault_of_addition(lora, outputs, dtype, rows),
            rows_of_a_token=self.top_k,
        )


def expert_slots(
    gate_up: Sequence[tuple[Tensor, Tensor]], down: tuple[Tensor, Tensor]
) -> PreparedExpertsLoRA:
    """Return vLLM's slots as the compiled path reads them: views, so that what is written is read.

    Args:
        gate_up: for each slice A ``[slots, experts, rank, hidden]`` and B ``[slots, experts,
            outputs, rank]``, the latter a view of ``[slots, experts, rank, outputs]``. Two slices,
            gate and up, or one for both.
        down: the same for the single slice of ``down``.

    Returns:
        The adapters, with scalings of 1 since vLLM multiplies B by them.
    """
    slots, experts = down[0].shape[:2]
    return PreparedExpertsLoRA(_prepared(gate_up), _prepared([down]), slots, experts)


def _prepared(pairs: Sequence[tuple[Tensor, Tensor]]) -> PreparedLoRA:
    slices, start = [], 0
    for a, b in pairs:
        bt = b.transpose(2, 3).flatten(0, 1)  # [slots * experts, rank, outputs]
        scaling = bt.new_ones(len(bt), dtype=torch.float32)
        slices.append(PreparedSlice(a.flatten(0, 1), bt, scaling, start))
        start += b.shape[2]
    return PreparedLoRA(tuple(slices))


def _at_rank(lora: PreparedExpertsLoRA, rank: int) -> PreparedExpertsLoRA:
    """Return a view of the first ranks of all slots."""
    gate_up, down = (
        None if layer is None else at_rank(layer, rank) for layer in (lora.gate_up, lora.down)
    )
    return PreparedExpertsLoRA(gate_up, down, lora.adapters, lora.experts)


def _signature(weight: PreparedExperts) -> tuple[object, ...]:
    return weight.count, weight.gate_up[0].signature, weight.down[0].signature
