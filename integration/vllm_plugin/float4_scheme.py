"""NVFP4 and MXFP4 weights in vLLM, loaded as the checkpoint stores them, run by our kernels.

vLLM has no kernel for weight-only FP4 on a CPU. Where it merges modules into one layer, it takes
the largest of their global scales for all; here they must be equal, since every weight is exact.

Source: vLLM's ``CompressedTensorsW4A4Fp4`` and ``CompressedTensorsW4A4Mxfp4``, which allocate the
same tensors.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
)
from vllm.model_executor.parameter import (
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from int4_lora.compiled import prepare
from int4_lora.integration.vllm_plugin.loading import in_place_of
from int4_lora.integration.vllm_plugin.scheme import kernel_bias
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer
from int4_lora.reference import Float4Weight

__all__ = ["Float4Scheme"]

SCALES = {"nvfp4": (16, torch.float8_e4m3fn), "mxfp4": (32, torch.uint8)}  # columns, dtype
TENSORS = ("weight_packed", "weight_scale", "weight_global_scale")


class Float4Scheme(CompressedTensorsScheme):
    """A scheme for FP4 weights with activations of 16 bits.

    Args:
        name: the format of the weight.
        served: the plug-in's state of the layer.
    """

    def __init__(self, name: Literal["nvfp4", "mxfp4"], served: ServedLayer) -> None:
        self.name, self.served = name, served

    @classmethod
    def get_min_capability(cls) -> int:
        """Return no limit."""
        return -1

    def create_weights(
        self,
        layer: Any,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any],
        **kwargs: Any,
    ) -> None:
        """Allocate the checkpoint's tensors.

        Raises:
            ValueError: the option backend asks for vLLM's kernel, or tensor parallelism would split
                a group.
        """
        if self.served.engine.options.backend == "stock-base":
            raise ValueError(
                f"int4_lora: vLLM has no kernel for {self.served.name} of {self.name}: leave out "
                "the option backend"
            )
        size, dtype = SCALES[self.name]
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        if columns % size:
            raise ValueError(
                f"int4_lora: {self.served.name}: tensor parallelism would split groups of {size} "
                "columns: serve on fewer ranks"
            )
        matrix = {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader}
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
        layer.register_parameter("weight_packed", ModelWeightParameter(data=packed, **matrix))
        scale = torch.empty(rows, columns // size, dtype=dtype)
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=scale, **matrix))
        if self.name == "nvfp4":
            over = torch.full((len(output_partition_sizes),), torch.nan, dtype=torch.float32)
            parameter = PerTensorScaleParameter(data=over, weight_loader=weight_loader)
            layer.register_parameter("weight_global_scale", parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make our layout the layer's only copy.

        Raises:
            ValueError: merged modules have different global scales, or the layer is not right by
                the reference.
        """
        served = self.served
        packed = self._weight(layer)
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare(packed)
        fault = served.base_fault(packed, prepared, kernel_bias(layer))
        if fault is not None:
            raise ValueError(
                f"int4_lora: {served.name} is not right by the reference, and vLLM has no kernel "
                f"for {self.name}: {fault}"
            )
        served.hold(in_place_of(packed.packed, prepared))
        del packed
        for name in TENSORS:
            if name in layer._parameters:
                delattr(layer, name)
        # vLLM's LoRA layers ask a parameter of this name for its device
        placeholder = torch.empty(0, dtype=torch.uint8, device=prepared.device)
        layer.weight_packed = nn.Parameter(placeholder, requires_grad=False)
        served.engine.weight_loaded(served)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the base layer: x ``[..., in_features]``."""
        y = self.served.forward(x.flatten(0, -2), None, bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _weight(self, layer: Any) -> Float4Weight:
        """Return the loaded tensors as the checkpoint has them."""
        over = None
        if self.name == "nvfp4":
            over = layer.weight_global_scale.data
            if not torch.equal(over, over[:1].expand_as(over)):
                raise ValueError(
                    f"int4_lora: the modules that vLLM merges into {self.served.name} have the "
                    f"global scales {over.tolist()}, and the merged layer can have only one: "
                    "quantise them with a shared one, as llm-compressor does, or serve a dense "
                    "model (int4-lora unpack)"
                )
            over = over[:1].clone()
        return Float4Weight(
            packed=layer.weight_packed.data,
            scale=layer.weight_scale.data,
            shape=(layer.output_size_per_partition, layer.input_size_per_partition),
            global_scale=over,
        )
