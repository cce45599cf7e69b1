"""The INT4 weights of vLLM's layers, kept as the checkpoint has them and computed by our kernels.

Source: vLLM's ``CompressedTensorsWNA16``, which allocates and loads them and stands in where its
kernel is faster or ours is not right.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)

from int4_lora.compiled import PreparedWeight, prepare
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.integration.vllm_plugin import in_graph
from int4_lora.integration.vllm_plugin.load_check import (
    fault_of_addition,
    fault_of_layer,
    graph_of_layer,
)
from int4_lora.integration.vllm_plugin.session import Session
from int4_lora.integration.vllm_plugin.stock_trial import Kind, stock_is_faster
from int4_lora.reference import PackedWeight

__all__ = ["Int4Scheme", "adapters_fault", "own_bias"]

PARTS = ("weight_packed", "weight_scale", "weight_zero_point")


class Int4Scheme(CompressedTensorsWNA16):
    """vLLM's scheme for packed INT4 weights, with our layout and kernels after loading.

    Args:
        stock: the scheme that vLLM chose for the layer.
        session: what all layers of the engine share.
    """

    def __init__(self, stock: CompressedTensorsWNA16, session: Session) -> None:
        group_size = None if stock.group_size == -1 else stock.group_size
        super().__init__(
            strategy=stock.strategy,
            num_bits=stock.num_bits,
            group_size=group_size,
            symmetric=stock.symmetric,
            layer_name=stock.layer_name,
        )
        self.session = session
        self.scale_dtypes: set[torch.dtype] = set()

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
        """Allocate the checkpoint's tensors; decide whether vLLM's kernel is to compute."""
        super().create_weights(
            layer=layer,
            output_size=output_size,
            input_size=input_size,
            output_partition_sizes=output_partition_sizes,
            input_size_per_partition=input_size_per_partition,
            params_dtype=params_dtype,
            weight_loader=self._keeping_the_dtype(weight_loader),
            **kwargs,
        )
        self.kind = Kind(
            tuple(output_partition_sizes),
            input_size_per_partition,
            input_size,
            self.group_size,
            bool(self.symmetric),
            params_dtype,
            params_dtype,
        )
        served, backend = layer.int4_lora, self.session.options.backend
        if backend == "stock-base":
            served.stock_because = "as the option backend asks"
        elif backend == "auto":
            served.stock_because = _stock_is_better(self.kind, layer.weight_packed.device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the loaded weight out for our kernels, or hand it to vLLM's."""
        served = layer.int4_lora
        if served.stock_because is None and len(self.scale_dtypes) > 1:
            served.stock_because = f"merged of scales in {sorted(map(str, self.scale_dtypes))}"
        if served.stock_because is None and self.session.options.backend == "auto":
            scale = layer.weight_scale  # only now is its dtype known
            kind = dataclasses.replace(self.kind, scale_dtype=scale.dtype)
            served.stock_because = _stock_is_better(kind, scale.device)
        if served.stock_because is None:
            served.stock_because = self._take(layer)
        if served.stock_because is not None:
            scale = layer.weight_scale  # vLLM's kernels take scales in the dtype of x alone
            scale.data = scale.data.to(self.kind.dtype)
            super().process_weights_after_loading(layer)
        self.session.loaded_one(served)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the base layer: x ``[..., in_features]``."""
        served = layer.int4_lora
        if served.weight is None:
            return super().apply_weights(layer, x, bias)
        if torch.compiler.is_compiling() and self.session.options.in_graph == "custom-op":
            name, outputs = in_graph.graph_name(served.name), served.weight.out_features
            y = in_graph.linear(x.flatten(0, -2), None, bias, name, outputs)
            return y.view(*x.shape[:-1], outputs)
        return served.base(x, bias)

    def _keeping_the_dtype(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return a loader that keeps the dtype of the checkpoint's scales; vLLM would cast."""

        def loader(param: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> Any:
            if loaded.is_floating_point():
                if loaded.dtype != param.dtype and self.scale_dtypes <= {loaded.dtype}:
                    param.data = param.data.to(loaded.dtype)
                self.scale_dtypes.add(loaded.dtype)
            return load(param, loaded, *args, **kwargs)

        return loader

    def _take(self, layer: Any) -> str | None:
        """Make our layout the layer's only copy; return why it could not be, or None."""
        served = layer.int4_lora
        zero_point = getattr(layer, "weight_zero_point", None)
        weight = PackedWeight(
            packed=layer.weight_packed.data,
            scale=layer.weight_scale.data,
            shape=(layer.output_size_per_partition, layer.input_size_per_partition),
            zero_point=None if zero_point is None else zero_point.data,
        )
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare(weight)
        fault = self._fault(served.name, weight, prepared, own_bias(layer))
        if fault is not None:
            return f"not right by the reference: {fault}"
        served.hold(_in_the_place_of(weight.packed, prepared))
        self.session.packed.pop(served.name, None)
        self.session.by_name[in_graph.graph_name(served.name)] = served
        del weight
        for part in PARTS:
            if part in layer._parameters:
                delattr(layer, part)
        # vLLM's LoRA layers ask something of this name for its device; where it reloads weights it
        # frees what parameters hold
        place = torch.empty(0, dtype=torch.int32, device=prepared.device)
        layer.weight_packed = nn.Parameter(place, requires_grad=False)
        return None

    def _fault(
        self, name: str, weight: PackedWeight, prepared: PreparedWeight, bias: Tensor | None
    ) -> str | None:
        """Return what is wrong with this kind of layer, or None."""
        if not prepared.holds(weight):
            return "its layout does not give the checkpoint's bits back"
        key = ("base", prepared.signature, bias is None)
        dtype = self.session.dtype
        return self.session.fault(
            key,
            name,
            lambda tokens: graph_of_layer(prepared, dtype, tokens),
            lambda tokens: fault_of_layer(weight, prepared, dtype, tokens, None, bias),
        )


def _in_the_place_of(packed: Tensor, prepared: PreparedWeight) -> PreparedWeight:
    """Return the same layout in the memory of the checkpoint's words, which are lost.

    Layers are laid out one after the other between tensors that stay; what each of them frees is
    not always given back, nor of use to the next.
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


def _stock_is_better(kind: Kind, device: torch.device) -> str | None:
    """Return why vLLM's kernel is to compute a kind of layer, or None."""
    try:
        faster = stock_is_faster(kind, device)
    except Exception as error:  # Inductor raises whatever its compilers do
        return f"ours does not run: {type(error).__name__}: {error}".partition("\n")[0]
    return None if faster is None else f"measured {faster}"


def adapters_fault(layer: Any) -> str | None:
    """Return what is wrong with the adapters' term of a layer of ours, or None."""
    served, session = layer.int4_lora, layer.int4_lora.session
    lora, weight, bias = served.lora, served.weight, own_bias(layer)
    shapes = tuple((one.a.shape, one.start, one.stop) for one in lora.slices)
    dtype, device = session.dtype, lora.slices[0].a.device.type
    if weight is None:
        outputs = lora.slices[-1].stop
        return session.fault(
            ("added", outputs, shapes),
            served.name,
            lambda tokens: bucket_of(tokens, device),
            lambda tokens: fault_of_addition(lora, outputs, dtype, tokens),
        )
    return session.fault(
        ("adapters", weight.signature, shapes, bias is None),
        served.name,
        lambda tokens: graph_of_layer(weight, dtype, tokens, lora),
        lambda tokens: fault_of_layer(weight.packed_weight(), weight, dtype, tokens, lora, bias),
    )


def own_bias(layer: Any) -> Tensor | None:
    """Return the bias that the layer's kernel adds on this rank, or None."""
    elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    return None if layer.skip_bias_add or elsewhere else layer.bias
