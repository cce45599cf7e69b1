"""vLLM's LoRA layers with adapters computed by ``int4_lora.compiled``.

Each is vLLM's own class, which loads adapters and splits them over ranks, with another ``apply``.
They stand before vLLM's own in the tuple that ``vllm.lora.utils.from_layer`` walks, and take only
layers that ``Int4LoRAConfig`` has seen: without the flag none.

Source: vLLM's ``vllm/lora/layers``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from typing import Any

import torch
import vllm.lora.layers as upstream_layers
import vllm.lora.utils as upstream_utils
from torch import Tensor
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from int4_lora.compiled import PreparedLoRA
from int4_lora.integration.vllm_plugin import in_graph
from int4_lora.integration.vllm_plugin.scheme import adapters_fault
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer, adapters_of
from int4_lora.integration.vllm_plugin.unpacking import unpacked
from int4_lora.integration.vllm_plugin.vocabulary import answer_for

__all__ = ["LAYERS", "Int4LoRALayer", "install_lora_layers"]

PLAIN = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)


class Int4LoRALayer:
    """What is put before each of vLLM's LoRA layers.

    Source:
        The request this project began with names ``_check_int4_quantization`` and
        ``get_unpacked_weights``.
    """

    base_layer: Any
    punica_wrapper: Any
    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]

    @classmethod
    def can_replace_layer(
        cls,
        source_layer: Any,
        lora_config: Any,
        packed_modules_list: list[str],
        model_config: Any = None,
    ) -> bool:
        """Return whether a layer is one of ours, of a kind that vLLM's class takes."""
        ours = isinstance(getattr(source_layer, "int4_lora", None), ServedLayer)
        plain = type(source_layer) in PLAIN  # a subclass may have a forward of its own
        return (
            ours
            and plain
            and super().can_replace_layer(  # type: ignore[misc]
                source_layer=source_layer,
                lora_config=lora_config,
                packed_modules_list=packed_modules_list,
                model_config=model_config,
            )
        )

    @property
    def served(self) -> ServedLayer:
        """What the backend knows of the layer."""
        served = self.base_layer.int4_lora
        assert isinstance(served, ServedLayer)
        return served

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Make the slots of the adapters; compile and check everything that will run."""
        super().create_lora_weights(max_loras, lora_config, model_config)  # type: ignore[misc]
        lora, views = adapters_of(self.lora_a_stacked, self.lora_b_stacked)
        self.lora_b_stacked = views
        self.served.lora = lora
        self.served.stock_lora_because = adapters_fault(self.base_layer)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put an adapter in a slot."""
        super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
        self._refresh_finite()
        session = self.served.session
        parts = session.packed_modules.get(self.served.name.rpartition(".")[2], ())
        if isinstance(lora_a, list) and len(lora_a) == len(parts):
            set_now = [part for part, a in zip(parts, lora_a, strict=True) if a is not None]
        else:
            set_now = list(parts) or [self.served.name.rpartition(".")[2]]
        session.warn_outside(self.served, tuple(set_now))

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        super().reset_lora(index)  # type: ignore[misc]
        self._refresh_finite()

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer with each token's adapter: x ``[..., in_features]``."""
        served = self.served
        if served.stock_lora_because is not None and x.device.type != "cpu":
            return super().apply(x, bias)  # type: ignore[misc]
        rows = x.flatten(0, -2)
        ids = self.punica_wrapper._token_lora_indices[: rows.shape[0]]
        if served.stock_lora_because is not None:  # vLLM's operators for CPUs take -1 for a slot
            base = self.base_layer.quant_method.apply(self.base_layer, rows, bias)
            return served.plainly_added(base, rows, ids).view(*x.shape[:-1], -1)
        if served.weight is None:
            base = self.base_layer.quant_method.apply(self.base_layer, rows, bias)
            y = served.added(base, rows, ids)
        elif torch.compiler.is_compiling() and served.session.options.in_graph == "custom-op":
            name, outputs = in_graph.graph_name(served.name), served.weight.out_features
            y = in_graph.linear(rows, ids, bias, name, outputs)
        else:
            y = served.with_adapters(rows, ids, bias)
        return y.view(*x.shape[:-1], -1)

    def _check_int4_quantization(self) -> bool:
        """Return whether the base weight is an INT4 weight of the checkpoint."""
        return self.served.int4

    def get_unpacked_weights(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense base weight, bit for bit what the checkpoint says.

        Args:
            dtype: of the result; None means the scales' dtype.

        Returns:
            ``[out_features, in_features]`` of this rank, merged as the layer is. Shared with every
            caller while the cache keeps it: not to be written to.

        Raises:
            TypeError: the base weight is no INT4 weight.
        """
        if not self._check_int4_quantization():
            raise TypeError(
                f"{self.served.name} has no INT4 weight: it is {self.served.stock_because}"
            )
        return unpacked(self.base_layer, dtype)

    def _refresh_finite(self) -> None:
        lora = self.served.lora
        for one in () if not isinstance(lora, PreparedLoRA) else lora.slices:
            one.refresh_finite()


def _ours(name: str) -> type:
    """Return our class for one of vLLM's."""
    upstream = getattr(upstream_layers, name)
    return type(f"Int4{name}", (Int4LoRALayer, upstream), {"__module__": __name__})


Int4ColumnParallelLinearWithLoRA = _ours("ColumnParallelLinearWithLoRA")
Int4MergedColumnParallelLinearWithLoRA = _ours("MergedColumnParallelLinearWithLoRA")
Int4QKVParallelLinearWithLoRA = _ours("QKVParallelLinearWithLoRA")
Int4MergedQKVParallelLinearWithLoRA = _ours("MergedQKVParallelLinearWithLoRA")
Int4RowParallelLinearWithLoRA = _ours("RowParallelLinearWithLoRA")
Int4ReplicatedLinearWithLoRA = _ours("ReplicatedLinearWithLoRA")
Int4VariableSliceWithLoRA = _ours("MergedColumnParallelLinearVariableSliceWithLoRA")
LAYERS = (
    Int4ColumnParallelLinearWithLoRA,
    Int4MergedColumnParallelLinearWithLoRA,
    Int4QKVParallelLinearWithLoRA,
    Int4MergedQKVParallelLinearWithLoRA,
    Int4RowParallelLinearWithLoRA,
    Int4ReplicatedLinearWithLoRA,
    Int4VariableSliceWithLoRA,
)


def install_lora_layers() -> None:
    """Put our layers before vLLM's, once a process; log the layers when vLLM has wrapped them."""
    if LAYERS[0] in upstream_utils._all_lora_classes:
        return
    upstream_utils._all_lora_classes = (*LAYERS, *upstream_utils._all_lora_classes)
    create = LoRAModelManager._create_lora_modules

    @functools.wraps(create)
    def create_and_announce(self: Any) -> None:
        create(self)
        ours = [one for one in self.modules.values() if isinstance(one, Int4LoRALayer)]
        for module in self.modules.values() if ours else ():
            answer_for(module)
        for module in ours:
            module.served.session.announce()

    LoRAModelManager._create_lora_modules = create_and_announce
