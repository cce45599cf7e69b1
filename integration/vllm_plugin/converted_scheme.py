"""AWQ's and GPTQ's tensors in vLLM: loaded as they are stored, and converted layer by layer.

vLLM's loaders find tensors by name, so the layer has parameters of the checkpoint's names while it
loads. Then its weight becomes that of ``Int4Scheme``, exactly, and the loaded tensors are freed:
beyond one copy of the model, memory holds one layer, whose codes are widened meanwhile.

Source: vLLM's ``AutoAWQMarlinLinearMethod`` and ``AutoGPTQLinearMethod`` for the dimensions along
which tensors are split and packed; ``docs/format.md`` for the conversion.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from int4_lora.integration.checkpoint.assembly import assemble
from int4_lora.integration.checkpoint.compressed_tensors import tensors_of
from int4_lora.integration.checkpoint.layouts import AWQ
from int4_lora.integration.checkpoint.scheme import Scheme
from int4_lora.integration.vllm_plugin.column_order import ColumnOrder
from int4_lora.integration.vllm_plugin.loading import keeping_scale_dtype
from int4_lora.integration.vllm_plugin.scheme import ORDER, TENSORS, Int4Scheme
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer

__all__ = ["ConvertedScheme"]

STORED = ("qweight", "qzeros", "scales", "g_idx")


class ConvertedScheme(Int4Scheme):
    """``Int4Scheme`` for a layer whose checkpoint has AWQ's or GPTQ's tensors.

    Args:
        stock: the scheme that vLLM has for the same weight in compressed-tensors.
        served: the plug-in's state of the layer.
        source: how the checkpoint stores the weight.
    """

    def __init__(self, stock: Any, served: ServedLayer, source: Scheme) -> None:
        super().__init__(stock, served, ordered=source.actorder == "group")
        self.source = source
        self._allocated: dict[str, nn.Parameter] = {}

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
        """Allocate the checkpoint's tensors in place of those of compressed-tensors.

        Raises:
            ValueError: a rank's outputs or inputs fill no whole words, or its inputs no groups.
        """
        super().create_weights(
            layer=layer,
            output_size=output_size,
            input_size=input_size,
            output_partition_sizes=output_partition_sizes,
            input_size_per_partition=input_size_per_partition,
            params_dtype=params_dtype,
            weight_loader=weight_loader,
            **kwargs,
        )
        for name in (*TENSORS, "weight_shape", ORDER):
            parameter = layer._parameters.pop(name, None)
            if parameter is not None and name != ORDER:
                parameter.data = parameter.data.new_empty(0)
                self._allocated[name] = parameter
        per_word = 32 // self.num_bits
        along_outputs = self.source.format == AWQ
        columns, rows = input_size_per_partition, sum(output_partition_sizes)
        if columns % self._columns_of_a_group(input_size):
            raise ValueError(
                f"int4_lora: {self.served.name}: tensor parallelism would split groups of "
                f"{self._columns_of_a_group(input_size)} columns: serve on fewer ranks"
            )
        for count, what in ((rows, "out_features"), (columns, "in_features")):
            if count % per_word:
                raise ValueError(
                    f"int4_lora: {self.served.name}: {what} must be a multiple of {per_word} on "
                    f"each rank, got {count}"
                )
        groups = columns // self._columns_of_a_group(input_size)
        load = keeping_scale_dtype(weight_loader, self.served.scale_dtypes)
        words = (columns, rows // per_word) if along_outputs else (columns // per_word, rows)
        layer.register_parameter("qweight", _words(words, along_outputs, per_word, load))
        layer.register_parameter("qzeros", _words((groups, rows // per_word), True, per_word, load))
        scales = torch.empty(groups, rows, dtype=params_dtype)
        parameter = GroupQuantScaleParameter(
            data=scales, input_dim=0, output_dim=1, weight_loader=load
        )
        layer.register_parameter("scales", parameter)
        if not along_outputs:
            self.order = self._order_of(len(output_partition_sizes), input_size)
            order = BasevLLMParameter(
                data=torch.full((columns,), -1, dtype=torch.int32), weight_loader=self.order.load
            )
            layer.register_parameter("g_idx", order)

    def _columns_of_a_group(self, all_columns: int) -> int:
        return all_columns if self.group_size == -1 else self.group_size

    def _order_of(self, modules: int, all_columns: int) -> ColumnOrder:
        """Return what loads ``g_idx``.

        Without an activation order it numbers the groups, and each rank needs its part only.
        """
        usual = torch.arange(all_columns, dtype=torch.int32)
        usual //= self._columns_of_a_group(all_columns)
        return ColumnOrder(
            self.served.name, "g_idx", modules, None if self.source.actorder == "group" else usual
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Convert the loaded weight, free the loaded tensors, and go on as ``Int4Scheme``.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: the weight cannot be converted; the message names the layer.
        """
        loaded = {name: layer._parameters.pop(name, None) for name in STORED}
        tensors = {
            name: parameter.data for name, parameter in loaded.items() if parameter is not None
        }
        del loaded
        tensors.pop("g_idx", None)
        order = self.order.take()
        if self.source.actorder == "group":
            if order is None:
                raise ValueError(
                    f"int4_lora: {self.served.name} has no g_idx, where config.json says desc_act "
                    "true: its columns would be read in the wrong order"
                )
            tensors["g_idx"] = order
        try:
            weight = assemble(self.source, tensors, None)
        except (TypeError, ValueError) as error:
            raise type(error)(f"int4_lora: {self.served.name}: {error}") from error
        del tensors
        converted = tensors_of(weight)
        for name, parameter in self._allocated.items():
            if name in converted:
                parameter.data = converted[name]
                layer.register_parameter(name, parameter)
        g_idx = weight.g_idx
        del weight, converted
        self._lay_out(layer, g_idx)
        for name, parameter in self._allocated.items():
            if layer._parameters.get(name) is not parameter:  # the layout has taken its place
                parameter.data = parameter.data.new_empty(0)


def _words(
    shape: tuple[int, int], along_outputs: bool, per_word: int, load: Callable[..., Any]
) -> PackedvLLMParameter:
    """Return a parameter of words ``[inputs, outputs]``, packed along one of the two."""
    return PackedvLLMParameter(
        data=torch.empty(shape, dtype=torch.int32),
        input_dim=0,
        output_dim=1,
        packed_dim=int(along_outputs),
        packed_factor=per_word,
        weight_loader=load,
    )
