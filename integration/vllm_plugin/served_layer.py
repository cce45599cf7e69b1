"""The plug-in's state of one linear layer, and the layer's arithmetic.

vLLM's layer holds it as ``layer.int4_lora``. The base is computed by ``int4_lora.compiled``, or by
vLLM's own kernel for a reason that is kept; the adapters by ``int4_lora.compiled`` in either case,
fused with the base or added to it.

Source: vLLM's ``BaseLinearLayerWithLoRA`` for the layout of the adapters.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from int4_lora.compiled import PreparedLoRA, PreparedWeight, add_lora, int4_linear
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.compiled.linear import BoundLayer, any_tokens
from int4_lora.integration.vllm_plugin.base_choice import OURS, VLLM, Choice
from int4_lora.integration.vllm_plugin.load_check import (
    fault_of_addition,
    fault_of_layer,
    graph_key_of_layer,
)
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.slot_ranks import SlotRanks, at_rank, narrower_ranks
from int4_lora.reference import LoRAStack, expand, shrink
from int4_lora.reference.float4_weight import BaseWeight
from int4_lora.reference.lora import accumulation_dtype

if TYPE_CHECKING:
    from int4_lora.integration.vllm_plugin.stock_trial import Kind

__all__ = ["ServedLayer", "adapter_slots"]


@dataclass(eq=False)
class ServedLayer:
    """All that the plug-in knows of one linear layer.

    Args:
        name: the layer's full name in vLLM's model.
        engine: what all layers of the engine share.
        int4: whether the checkpoint has a weight for it that our kernels take: INT4, or on a CPU
            INT8 and FP4.
        packed: whether the checkpoint has a packed weight for it, of 4 or 8 bits.
        fallback_reason: why vLLM's own kernel computes the base, or None while ours does.
        kind: what the time of the base depends on; only of INT4 layers.
        scale_dtypes: of the checkpoint's scales, as they were loaded.
        loaded: whether the weight has been loaded.
        choice: whose code computes what, if it was measured.
        weight: the base weight, laid out for our kernels; None where vLLM's computes.
        shared: the weight in vLLM's layout, where our code computes many tokens on it.
        lora: the slots of the adapters, at their whole rank.
        slot_ranks: the rank of the adapter in each slot, and the slots at several ranks.
        lora_fallback_reason: why adapters are added eagerly, or None.
        stock_quantises: whether vLLM's kernel would quantise activations to int8 here.
        activations_quantised: whether vLLM's kernel does, in this layer.
        cached: the packed weight whose dense weight the engine's cache keeps.
        operators: vLLM's punica wrapper, which knows whether any token has an adapter.
    """

    name: str
    engine: ServedEngine = field(default_factory=ServedEngine)
    int4: bool = False
    packed: bool = False
    fallback_reason: str | None = "no INT4 weights"
    kind: Kind | None = None
    scale_dtypes: set[torch.dtype] = field(default_factory=set)
    loaded: bool = False
    choice: Choice | None = None
    weight: PreparedWeight | None = None
    shared: PreparedWeight | None = None
    lora: PreparedLoRA | None = None
    slot_ranks: SlotRanks[PreparedLoRA] | None = None
    lora_fallback_reason: str | None = None
    stock_quantises: bool = False
    activations_quantised: bool = False
    cached: BaseWeight | None = None
    operators: Any = None
    _bound: dict[int, BoundLayer] = field(default_factory=dict)  # by rank
    _stock_base: Callable[[Tensor, Tensor | None], Tensor] | None = None

    @property
    def ours_from(self) -> int | None:
        """The number of tokens from which our code computes on vLLM's layout, or None for none."""
        return None if self.choice is None or self.shared is None else self.choice.plan.ours_from

    @property
    def follows_choice(self) -> bool:
        """Whether the layer runs as was chosen; not if a check has failed."""
        plan = None if self.choice is None else self.choice.plan
        ours = self.weight is not None
        return plan is not None and (
            (plan.base == OURS) == ours and plan.ours_from == self.ours_from
        )

    @property
    def has_stock_adapters(self) -> bool:
        """Whether vLLM's operators add the adapters, because they were measured faster."""
        return self.choice is not None and self.choice.plan.adapters == VLLM

    @property
    def name_in_graph(self) -> str:
        """The name by which the operator of ``layer_operator`` finds it, beside vLLM's layers."""
        return f"{self.name}.int4_lora"

    def hold(self, weight: PreparedWeight) -> None:
        """Take a weight. One of the same layout is copied into the tensors of the first.

        Where weights are reloaded, captured CUDA graphs go on reading the first one's tensors.
        """
        self.weight = self._kept(self.weight, weight)

    def share(
        self, weight: PreparedWeight, stock_base: Callable[[Tensor, Tensor | None], Tensor]
    ) -> None:
        """Take a weight in vLLM's layout, for our code to compute many tokens on it.

        Args:
            weight: the tensors that vLLM's kernel reads.
            stock_base: ``stock_base(x, bias)`` runs vLLM's kernel.
        """
        self.shared, self._stock_base = self._kept(self.shared, weight), stock_base

    def _kept(self, held: PreparedWeight | None, given: PreparedWeight) -> PreparedWeight:
        """Return the weight to keep: the held one with the given one's values, if it is alike."""
        self.cached = None
        self.engine.forward_context[self.name_in_graph] = self
        if held is None or held.signature != given.signature:
            return given
        for old, new in zip(held.tensors, given.tensors, strict=True):
            old.copy_(new)
        return held

    def base_by_tokens(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the base, by vLLM's kernel or ours as the number of tokens asks.

        Args:
            x: ``[tokens, in_features]``.
            bias: ``[out_features]`` or None.
        """
        assert self.shared is not None
        assert self._stock_base is not None
        assert self.ours_from is not None
        if torch.compiler.is_compiling():
            assert self.engine.operator is not None
            return self.engine.operator(self, x, None, bias)
        if x.shape[0] >= self.ours_from:
            return int4_linear(x, self.shared, bias)
        return self._stock_base(x, bias)

    def forward(self, x: Tensor, adapter_ids: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return the layer by our weight, or its base by the weight that vLLM's kernel shares.

        Args:
            x: ``[tokens, in_features]``.
            adapter_ids: int64 ``[tokens]``, an id that is no slot for no adapter; or None for none.
            bias: ``[out_features]`` or None.
        """
        if self.weight is None:
            assert adapter_ids is None
            return self.base_by_tokens(x, bias)
        if torch.compiler.is_compiling():
            return self._in_graph(self.weight, x, adapter_ids, bias)
        lora = None if adapter_ids is None else self._adapters_of(adapter_ids)
        if adapter_ids is None or lora is None:
            return int4_linear(x, self.weight, bias)
        rank = lora.slices[0].rank
        bound = self._bound.get(rank)
        if (
            bound is None
            or bound.weight is not self.weight
            or bound.lora is not lora
            or bound.bias is not bias
        ):
            bound = self._bound[rank] = BoundLayer(self.weight, lora, bias)
        return bound(x, adapter_ids)

    def _in_graph(
        self, weight: PreparedWeight, x: Tensor, adapter_ids: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return the layer within vLLM's own torch.compile."""
        if self.engine.options.in_graph == "custom-op":
            assert self.engine.operator is not None
            return self.engine.operator(self, x, adapter_ids, bias)
        lora = None if adapter_ids is None else self.lora
        return any_tokens(x, weight, lora, adapter_ids, bias)

    def add_adapters(self, base: Tensor, x: Tensor, adapter_ids: Tensor) -> Tensor:
        """Return the output of vLLM's base kernel with the adapters added."""
        assert self.lora is not None
        if torch.compiler.is_compiling():
            return add_terms(base, x, self.lora.slices, adapter_ids, None, any_tokens=True)
        lora = self._adapters_of(adapter_ids)
        return base if lora is None else add_lora(base, x, lora, adapter_ids)

    def _adapters_of(self, adapter_ids: Tensor) -> PreparedLoRA | None:
        """Return the slots at the rank that a batch needs, or None if no token has an adapter."""
        if self.slot_ranks is not None and adapter_ids.is_cpu:
            return self.slot_ranks.of_batch(adapter_ids)
        return None if self._none_active(adapter_ids) else self.lora

    def _none_active(self, adapter_ids: Tensor) -> bool:
        """Return whether no token has an adapter.

        On a GPU, reading the ids would wait for it: vLLM's own flag on the CPU tells. vLLM sets it
        for each step, and for the CUDA graphs that it captures for steps without adapters.
        """
        if adapter_ids.device.type == "cpu":
            return adapter_ids.numel() == 0 or int(adapter_ids.max()) < 0
        tokens = getattr(self.operators, "token_mapping_meta", None)
        flag = getattr(tokens, "no_lora_flag_cpu", None)
        return flag is not None and bool(flag.item())

    def base_fault(
        self,
        packed: BaseWeight,
        weight: PreparedWeight,
        bias: Tensor | None,
        least: int = 1,
    ) -> str | None:
        """Return what is wrong with a weight that our code computes on, or None.

        Args:
            packed: the checkpoint's tensors.
            weight: the same, laid out.
            bias: ``[out_features]`` or None.
            least: the fewest tokens that it computes.
        """
        if not weight.holds(packed):
            return "its layout does not give the checkpoint's bits back"
        dtype = self.engine.dtype
        return self.engine.fault_of_kind(
            ("base", weight.signature, bias is None),
            self.name,
            lambda tokens: graph_key_of_layer(weight, dtype, max(tokens, least)),
            lambda tokens: fault_of_layer(packed, weight, dtype, max(tokens, least), None, bias),
        )

    def read_at_ranks(self, bias: Tensor | None) -> None:
        """Read the slots at the ranks of each batch's adapters, as far as these are right.

        Without warm-up, only whole slots are read: their graphs are all that requests may wait for.

        Args:
            bias: ``[out_features]`` or None.
        """
        whole = self.lora
        assert whole is not None
        several = self.engine.options.warm_up and whole.slices[0].a.is_cpu
        ranks = narrower_ranks(whole.slices[0].rank) if several else []
        narrower = [at_rank(whole, rank) for rank in ranks]
        self.slot_ranks = SlotRanks(
            whole, [lora for lora in narrower if self.adapters_fault(lora, bias) is None]
        )

    def adapters_fault(self, lora: PreparedLoRA, bias: Tensor | None) -> str | None:
        """Return what is wrong with the layer's adapters, or None.

        Args:
            lora: the slots, at the rank at which they are read.
            bias: ``[out_features]`` or None.
        """
        weight, dtype = self.weight, self.engine.dtype
        signatures = tuple(part.signature for part in lora.slices)
        rank = lora.slices[0].rank
        if weight is not None:
            packed = functools.cache(weight.packed_weight)  # for all numbers of tokens
            return self.engine.fault_of_kind(
                ("adapters", weight.signature, signatures, bias is None),
                f"{self.name} with adapters of rank {rank}",
                lambda tokens: graph_key_of_layer(weight, dtype, tokens, lora),
                lambda tokens: fault_of_layer(packed(), weight, dtype, tokens, lora, bias),
            )
        outputs, device = lora.slices[-1].stop, lora.slices[0].a.device.type
        return self.engine.fault_of_kind(
            ("added", outputs, signatures),
            f"adapters of rank {rank} on {self.name}",
            lambda tokens: bucket_of(tokens, device),
            lambda tokens: fault_of_addition(lora, outputs, dtype, tokens),
        )


def adapter_slots(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]
) -> tuple[PreparedLoRA, tuple[Tensor, ...]]:
    """Lay a layer's slots out for the compiled path, and as vLLM writes to them.

    A is shared. B is held once, transposed, and vLLM gets a view of it: what it writes to a slot is
    what the compiled path reads.

    Args:
        lora_a: for each slice ``[slots, 1, rank, in_features]``.
        lora_b: for each slice ``[slots, 1, outputs, rank]``; only the shapes and dtype are read.

    Returns:
        The adapters, with scalings of 1 since vLLM multiplies B by them; and the views that take
        the place of ``lora_b``.
    """
    slices, views, start = [], [], 0
    for a, b in zip(lora_a, lora_b, strict=True):
        slots, _, outputs, rank = b.shape
        bt = b.new_zeros(slots, rank, outputs)
        slices.append(PreparedSlice(a[:, 0], bt, bt.new_ones(slots, dtype=torch.float32), start))
        views.append(bt.transpose(1, 2).unsqueeze(1))
        start += outputs
    return PreparedLoRA(tuple(slices)), tuple(views)


def add_eagerly(
    base: Tensor,
    x: Tensor,
    adapter_ids: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
) -> Tensor:
    """Return a base with the adapters added by the reference: for layers that failed the check.

    Args:
        base: ``[tokens, out_features]``.
        x: ``[tokens, in_features]``.
        adapter_ids: int64 ``[tokens]``, an id that is no slot for no adapter.
        lora_a: for each slice ``[slots, 1, rank, in_features]``.
        lora_b: for each slice ``[slots, 1, outputs, rank]``; the slices cover all outputs.
    """
    y, start = base.to(accumulation_dtype(x), copy=True), 0
    for a, b in zip(lora_a, lora_b, strict=True):
        stack = LoRAStack(a[:, 0], b[:, 0], torch.ones(len(a), device=a.device))
        ids = torch.where(adapter_ids < len(a), adapter_ids, -1)
        y[:, start : start + b.shape[2]] += expand(shrink(x, stack, ids), stack, ids)
        start += b.shape[2]
    return y.to(base.dtype)
