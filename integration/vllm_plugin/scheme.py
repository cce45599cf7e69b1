"""The packed weights of vLLM's layers, loaded as the checkpoint stores them, run by our kernels.

Source: vLLM's ``CompressedTensorsWNA16``, which allocates and loads them, and computes where its
kernel is faster or ours is wrong.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.parameter import BasevLLMParameter

from int4_lora.compiled import PreparedWeight, prepare
from int4_lora.integration.vllm_plugin.base_choice import VLLM
from int4_lora.integration.vllm_plugin.loading import keeping_scale_dtype
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer
from int4_lora.integration.vllm_plugin.stand_in_kernel import StandInKernel, standing_in
from int4_lora.integration.vllm_plugin.stock_arithmetic import (
    of_the_operator,
    quantises_activations,
    sixteen_bit_activations,
    would_quantise_activations,
)
from int4_lora.integration.vllm_plugin.stock_layout import shared_weight
from int4_lora.integration.vllm_plugin.stock_trial import Kind, choice_of
from int4_lora.reference import PackedWeight

__all__ = ["Int4Scheme", "in_place_of", "kernel_bias"]

TENSORS = ("weight_packed", "weight_scale", "weight_zero_point")
ORDER = "weight_g_idx"


class Int4Scheme(CompressedTensorsWNA16):
    """vLLM's scheme for packed INT4 and INT8 weights, with our layout and kernels after loading.

    Args:
        stock: the scheme that vLLM chose for the layer.
        served: the plug-in's state of the layer.
        ordered: whether the checkpoint has a ``weight_g_idx``, which vLLM does not take.
    """

    kernel: Any

    def __init__(
        self, stock: CompressedTensorsWNA16, served: ServedLayer, *, ordered: bool = False
    ) -> None:
        group_size = None if stock.group_size == -1 else stock.group_size
        super().__init__(
            strategy=stock.strategy,
            num_bits=stock.num_bits,
            group_size=group_size,
            symmetric=stock.symmetric,
            layer_name=stock.layer_name,
        )
        self.served, self.ordered = served, ordered

    def create_weights(
        self,
        layer: Any,
        output_size: int,
        input_size: int,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        """Allocate the checkpoint's tensors; decide whether vLLM's kernel is to compute.

        Raises:
            ValueError: columns in the order of activations are split over ranks.
        """
        if self.ordered and input_size != input_size_per_partition:
            raise ValueError(
                f"int4_lora: {self.served.name} has an activation order, and tensor parallelism "
                "would split its columns: serve on one rank, or quantise with actorder static"
            )
        with standing_in():
            super().create_weights(
                layer=layer,
                output_size=output_size,
                input_size=input_size,
                output_partition_sizes=output_partition_sizes,
                input_size_per_partition=input_size_per_partition,
                params_dtype=params_dtype,
                weight_loader=keeping_scale_dtype(weight_loader, self.served.scale_dtypes),
                **kwargs,
            )
        if self.ordered:
            self.kernel = StandInKernel(self.kernel.config, *TENSORS)
            self._allocate_order(layer, input_size)
        self.served.kind = Kind(
            outputs=tuple(output_partition_sizes),
            inputs=input_size_per_partition,
            all_inputs=input_size,
            group_size=self.group_size,
            symmetric=bool(self.symmetric),
            dtype=params_dtype,
            scale_dtype=params_dtype,
            slots=self.served.engine.slots,
            rank=self.served.engine.rank,
        )
        self.served.stock_quantises = would_quantise_activations(self.kernel, params_dtype)
        backend = self.served.engine.options.backend
        if backend == "stock-base":
            self.served.fallback_reason = "as the option backend asks"
        elif self._may_try_stock():
            self._try_stock(self.served.kind, layer.weight_packed.device)

    def _allocate_order(self, layer: Any, columns: int) -> None:
        """Allocate the ``weight_g_idx`` of the checkpoint."""
        order = BasevLLMParameter(
            data=torch.full((columns,), -1, dtype=torch.int32),
            weight_loader=_one_order(self.served.name),
        )
        layer.register_parameter(ORDER, order)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the loaded weight out for our kernels, or hand it to vLLM's."""
        served, kind = self.served, self.served.kind
        assert kind is not None
        if served.fallback_reason is None and len(served.scale_dtypes) > 1:
            served.fallback_reason = f"merged of scales in {sorted(map(str, served.scale_dtypes))}"
        if served.fallback_reason is None and self._may_try_stock():
            scale = layer.weight_scale  # its dtype is known only after loading
            self._try_stock(dataclasses.replace(kind, scale_dtype=scale.dtype), scale.device)
        if served.fallback_reason is None:
            served.fallback_reason = self._take_weight(layer)
        if served.fallback_reason is not None:
            self._leave_to_stock(layer, kind.dtype)
        served.engine.weight_loaded(served)

    def _leave_to_stock(self, layer: Any, dtype: torch.dtype) -> None:
        """Let vLLM's kernel lay the weight out; let ours compute many tokens if so chosen."""
        served = self.served
        choice = served.choice
        ours_from = None if choice is None else choice.plan.ours_from
        packed = None if ours_from is None else self._packed_weight(layer)
        scale = layer.weight_scale  # vLLM's kernels take scales in the dtype of x alone
        scale.data = scale.data.to(dtype)
        as_vllm_does = served.engine.options.backend == "stock-base" or of_the_operator()
        with nullcontext() if as_vllm_does else sixteen_bit_activations():
            super().process_weights_after_loading(layer)
        served.activations_quantised = quantises_activations(layer)
        if packed is None or ours_from is None:
            return
        shared = shared_weight(layer, packed)
        if shared is None:
            return
        if served.base_fault(packed, shared, kernel_bias(layer), ours_from) is None:
            served.share(shared, functools.partial(super().apply_weights, layer))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the base layer: x ``[..., in_features]``."""
        if self.served.weight is None and self.served.shared is None:
            return super().apply_weights(layer, x, bias)
        y = self.served.forward(x.flatten(0, -2), None, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _may_try_stock(self) -> bool:
        """Return whether vLLM's kernel may be chosen for its speed."""
        of_vllm = not isinstance(self.kernel, StandInKernel)
        return of_vllm and self.served.engine.options.backend == "auto"

    def _try_stock(self, kind: Kind, device: torch.device) -> None:
        """Choose whose code computes a kind of layer, measured once an engine."""
        engine = self.served.engine
        if kind not in engine.trials:
            # within a graph of vLLM's, the choice by the number of tokens is an operator's
            may_share = engine.options.in_graph == "custom-op" and kind.scale_dtype == kind.dtype
            with engine.compiling():
                engine.trials[kind] = choice_of(
                    kind, device, engine.options.favour, may_share=may_share
                )
        choice = self.served.choice = engine.trials[kind]
        self.served.fallback_reason = choice.reason if choice.plan.base == VLLM else None

    def _take_weight(self, layer: Any) -> str | None:
        """Make our layout the layer's only copy; return why that is impossible, or None."""
        packed = self._packed_weight(layer)
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare(packed)
        fault = self.served.base_fault(packed, prepared, kernel_bias(layer))
        if fault is not None:
            return f"not right by the reference: {fault}"
        self.served.hold(in_place_of(packed.packed, prepared))
        del packed
        for name in (*TENSORS, ORDER):
            if name in layer._parameters:
                delattr(layer, name)
        # vLLM's LoRA layers ask a parameter of this name for its device; where vLLM reloads
        # weights, it frees what the layer's parameters hold
        placeholder = torch.empty(0, dtype=torch.int32, device=prepared.device)
        layer.weight_packed = nn.Parameter(placeholder, requires_grad=False)
        return None

    def _packed_weight(self, layer: Any) -> PackedWeight:
        """Return the loaded tensors as the checkpoint has them."""
        zero_point = getattr(layer, "weight_zero_point", None)
        return PackedWeight(
            packed=layer.weight_packed.data,
            scale=layer.weight_scale.data,
            shape=(layer.output_size_per_partition, layer.input_size_per_partition),
            zero_point=None if zero_point is None else zero_point.data,
            g_idx=layer.weight_g_idx.data if self.ordered else None,
            bits=self.num_bits,
        )


def kernel_bias(layer: Any) -> Tensor | None:
    """Return the bias that the layer's kernel adds on this rank, or None."""
    added_elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    return None if layer.skip_bias_add or added_elsewhere else layer.bias


def _one_order(layer: str) -> Callable[..., Any]:
    """Return a loader of the order of a layer's columns, which all modules merged into it share.

    Args:
        layer: its name.
    """

    def load(param: nn.Parameter, loaded: Tensor, *_: Any, **__: Any) -> None:
        order = loaded.to(param.device, param.dtype)
        if bool((param.data >= 0).any()) and not torch.equal(param.data, order):
            raise ValueError(
                f"int4_lora: the modules that vLLM merges into {layer} have different "
                f"{ORDER}, and the merged layer can have only one: quantise with actorder static"
            )
        param.data.copy_(order)

    return load


def in_place_of(packed: Tensor, prepared: PreparedWeight) -> PreparedWeight:
    """Return the same layout in the memory of the checkpoint's words, which are lost.

    Layers are laid out one after the other, between tensors that stay. The memory that each frees
    is not always returned to the system, and may not fit the next.
    """
    moved = {}
    for field in dataclasses.fields(prepared):  # type: ignore[arg-type]
        laid_out = getattr(prepared, field.name)
        same_size = isinstance(laid_out, Tensor) and laid_out.nbytes == packed.nbytes
        if same_size and laid_out.is_contiguous() and packed.is_contiguous():
            room = packed.view(-1).view(laid_out.dtype).view(laid_out.shape)
            moved[field.name] = room.copy_(laid_out)
            break
    return dataclasses.replace(prepared, **moved)  # type: ignore[type-var]
