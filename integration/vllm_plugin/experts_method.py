"""INT4 experts in vLLM: allocated and loaded as the checkpoint has them, computed by our kernels.

vLLM's method of a layer of experts owns the parameters, its kernel computes them. Ours is a modular
kernel of vLLM's, between its router and its sum over ranks, so that its LoRA layers take it.

Source: vLLM's ``CompressedTensorsWNA16MoEMethod``, which needs AMX on x86 processors and refuses
adapters on every CPU.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.prepare_finalize import (
    make_moe_prepare_and_finalize_no_dp_ep,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

from int4_lora.compiled import PreparedExperts, prepare_experts
from int4_lora.integration.vllm_plugin.experts_loading import ExpertsLoader
from int4_lora.integration.vllm_plugin.layer_operator import run_experts_by_name
from int4_lora.integration.vllm_plugin.loading import in_place_of
from int4_lora.integration.vllm_plugin.served_experts import ServedExperts
from int4_lora.reference import ExpertsWeight, PackedWeight
from int4_lora.reference.moe import ACTIVATIONS

__all__ = ["Int4Experts", "Int4ExpertsMethod", "refuse_experts"]

PARTS = ("w13", "w2")


class Int4ExpertsMethod(FusedMoEMethodBase):
    """vLLM's method of a layer of experts whose weights are packed, group-wise or per channel.

    Args:
        weights: the checkpoint's quantisation of weights.
        moe: vLLM's configuration of the layer.
        served: the plug-in's state of the layer.
    """

    def __init__(self, weights: Any, moe: Any, served: ServedExperts) -> None:
        super().__init__(moe)
        self.bits: int = weights.num_bits
        self.symmetric: bool = weights.symmetric
        self.group_size: int | None = None if weights.strategy == "channel" else weights.group_size
        self.served = served
        served.top_k = moe.experts_per_token
        served.activation = moe.activation.value
        self._loader: ExpertsLoader | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of a module's tensors."""
        zero_point = () if self.symmetric else ("weight_zero_point",)
        return ("weight_packed", "weight_scale", *zero_point)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Allocate the checkpoint's tensors, for all experts in one.

        Raises:
            ValueError: the widths do not fit the groups or the words on each rank.
        """
        inter = intermediate_size_per_partition
        self._check_widths(hidden_size, inter)
        load: Callable[..., Any] = attributes["weight_loader"]
        names = {
            "w1": layer.ckpt_gate_proj_name,
            "w2": layer.ckpt_down_proj_name,
            "w3": layer.ckpt_up_proj_name,
        }
        ranks = self.moe.moe_parallel_config.tp_size
        self._loader = ExpertsLoader(load, self.served.name, names, ranks, self.served.scale_dtypes)
        words = 32 // self.bits  # codes in a word
        for part, rows, columns in (("w13", 2 * inter, hidden_size), ("w2", hidden_size, inter)):
            groups = 1 if self.group_size is None else columns // self.group_size
            shapes = {
                "weight_packed": ((rows, columns // words), torch.int32),
                "weight_scale": ((rows, groups), params_dtype),
                "weight_zero_point": ((rows // words, groups), torch.int32),
                "weight_shape": ((2,), torch.int64),
            }
            for tensor in (*self.tensors, "weight_shape"):
                shape, dtype = shapes[tensor]
                param = nn.Parameter(
                    torch.empty(num_experts, *shape, dtype=dtype), requires_grad=False
                )
                # vLLM's loader asks for all of these
                param.weight_loader = self._loader  # type: ignore[attr-defined]
                param.is_transposed = False  # type: ignore[attr-defined]
                param.quant_method = "channel" if self.group_size is None else "group"  # type: ignore[attr-defined]
                per_row = self.group_size is None and tensor != "weight_packed"
                param.whole_on_each_rank = part == "w2" and per_row  # type: ignore[attr-defined]
                layer.register_parameter(f"{part}_{tensor}", param)

    def _check_widths(self, hidden: int, inter: int) -> None:
        group, words = self.group_size, 32 // self.bits
        for name, width in (("hidden size", hidden), ("intermediate size of a rank", inter)):
            if width % words or (group is not None and width % group):
                rule = f"{words}" if group is None or width % words else f"the group size {group}"
                raise ValueError(
                    f"int4_lora: the {name} of the experts of {self.served.name} must be a "
                    f"multiple of {rule}, got {width}: serve on fewer ranks"
                )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the experts out for our kernels, check them, and free what was loaded.

        Raises:
            ValueError: the checkpoint lacks a tensor of an expert, or has scales of two dtypes.
        """
        assert self._loader is not None
        served = self.served
        self._loader.check_complete(self.tensors, layer.local_num_experts)
        if len(served.scale_dtypes) > 1:
            dtypes = sorted(map(str, served.scale_dtypes))
            raise ValueError(
                f"int4_lora: all experts of {served.name} must have scales of one dtype, "
                f"got {' and '.join(dtypes)}"
            )
        experts = ExpertsWeight(self._packed(layer, "w13"), self._packed(layer, "w2"))
        with torch.inference_mode(False), torch.no_grad():
            weight = prepare_experts(experts)
        fault = served.fault(experts, weight)
        if fault is None:
            served.hold(_in_place_of(experts, weight))
        else:
            served.fallback_reason = f"not right by the reference: {fault}"
            served.compute_plainly(experts)
        self._free(layer)
        self._make_kernel(layer)
        served.engine.weight_loaded(served)

    def _packed(self, layer: Any, part: str) -> list[PackedWeight]:
        """Return the tensors of one layer of all experts as the checkpoint has them."""
        packed, scale = (getattr(layer, f"{part}_{name}").data for name in self.tensors[:2])
        zero_point = None if self.symmetric else getattr(layer, f"{part}_weight_zero_point").data
        rows, columns = packed.shape[1], packed.shape[2] * (32 // self.bits)
        return [
            PackedWeight(
                packed=packed[expert],
                scale=scale[expert],
                shape=(rows, columns),
                zero_point=None if zero_point is None else zero_point[expert],
                bits=self.bits,
            )
            for expert in range(len(packed))
        ]

    def _free(self, layer: Any) -> None:
        """Delete what was loaded; leave what vLLM reads the experts' number and device from."""
        for part in PARTS:
            device = getattr(layer, f"{part}_weight_packed").device
            for tensor in (*self.tensors, "weight_shape"):
                delattr(layer, f"{part}_{tensor}")
            placeholder = torch.empty(layer.local_num_experts, 0, 0, device=device)
            setattr(layer, f"{part}_weight", nn.Parameter(placeholder, requires_grad=False))

    def _make_kernel(self, layer: Any) -> None:
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = mk.FusedMoEKernel(
            make_moe_prepare_and_finalize_no_dp_ep(use_monolithic=False),
            Int4Experts(self.moe, self.moe_quant_config, self.served),
        )

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """Return that x is not quantised; weights are our kernel's."""
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Return the sum of each token's experts: ``[tokens, hidden]``."""
        assert self.moe_kernel is not None
        y: Tensor = self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
        return y


class Int4Experts(LoRAExpertsMixin, mk.FusedMoEExpertsModular):
    """vLLM's kernel of experts, computed by ``int4_lora.compiled`` with each token's adapter.

    Args:
        moe_config: vLLM's configuration of the layer.
        quant_config: that of its activations.
        served: the plug-in's state of the layer, which holds the weights.
    """

    def __init__(self, moe_config: Any, quant_config: Any, served: ServedExperts) -> None:
        super().__init__(moe_config, quant_config)
        self.served = served

    @property
    def expects_unquantized_inputs(self) -> bool:
        """True: x is never quantised."""
        return True

    @staticmethod
    def activation_format() -> Any:
        """Return vLLM's standard format: ``[tokens, hidden]``."""
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_ep

    def moe_problem_size(
        self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor
    ) -> tuple[int, int, int, int, int]:
        """Return the numbers of experts, tokens, outputs of gate_up, columns of x, and k."""
        outputs = 2 * self.moe_config.intermediate_size_per_partition
        return w1.shape[0], a1.shape[0], outputs, a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return that only the output needs memory of vLLM's."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Return that the results are multiplied and summed already."""
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the sum of each token's experts into ``output``: ``[tokens, hidden]``."""
        if apply_router_weight_on_input:  # vLLM has multiplied x by them
            topk_weights = torch.ones_like(topk_weights)
        ids, context = None, self._lora_context
        if context is not None:
            ids = context.punica_wrapper._token_lora_indices[: hidden_states.shape[0]]
        if torch.compiler.is_compiling():
            y = run_experts_by_name(self.served, hidden_states, topk_ids, topk_weights, ids)
        else:
            y = self.served.forward(hidden_states, topk_ids, topk_weights, ids)
        output.copy_(y)


def refuse_experts(name: str, moe: Any, *, ordered: bool = False) -> None:
    """Refuse experts that never ran, or that our kernels do not compute.

    Args:
        name: the layer's.
        moe: vLLM's configuration of the layer.
        ordered: whether the checkpoint has columns in the order of activations.

    Raises:
        ValueError: they are refused; the message says what to do.
    """
    parallel = moe.moe_parallel_config
    if parallel.use_ep:
        raise ValueError(
            "int4_lora does not take expert parallelism: leave out --enable-expert-parallel; "
            "--tensor-parallel-size splits each expert over ranks"
        )
    if parallel.dp_size > 1 or parallel.pcp_size > 1:
        raise ValueError(
            "int4_lora does not take data parallelism of experts, which vLLM would split over its "
            "engines: leave out --data-parallel-size and run several servers"
        )
    if ordered:
        raise ValueError(
            f"int4_lora: the experts of {name} have an activation order, which vLLM does not load: "
            "quantise with actorder static"
        )
    activation = moe.activation.value
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"int4_lora: the activation of the experts of {name} must be one of "
            f"{', '.join(ACTIVATIONS)}, got {activation}"
        )
    for field in ("has_bias", "swiglu_limit"):
        if getattr(moe, field, None):
            raise ValueError(f"int4_lora: experts with {field} are not taken, as of {name}")


def _in_place_of(experts: ExpertsWeight, weight: PreparedExperts) -> PreparedExperts:
    """Return the same layouts in the memory of the checkpoint's words, which are lost."""
    layers = (
        tuple(
            in_place_of(packed.packed, laid_out)
            for packed, laid_out in zip(loaded, prepared, strict=True)
        )
        for loaded, prepared in ((experts.gate_up, weight.gate_up), (experts.down, weight.down))
    )
    return PreparedExperts(*layers)
