"""vLLM's LoRA layers with the adapters computed by ``int4_lora.compiled``.

Each is vLLM's own class, which loads adapters and splits them over ranks, with another ``apply``.
They stand before vLLM's own in the tuple that ``vllm.lora.utils.from_layer`` walks, and take only
layers that ``Int4LoRAConfig`` has seen: without the flag none.

Source: vLLM's ``vllm/lora/layers``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
import vllm.lora.layers as vllm_lora_layers
import vllm.lora.utils as vllm_lora_utils
from torch import Tensor
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from int4_lora.compiled import PreparedLoRA
from int4_lora.integration.vllm_plugin.contract import LORA_CLASSES
from int4_lora.integration.vllm_plugin.dense_weight import dense_weight
from int4_lora.integration.vllm_plugin.experts_lora import EXPERTS_LAYERS, Int4ExpertsLoRALayer
from int4_lora.integration.vllm_plugin.int4_adapter import loadable_folder
from int4_lora.integration.vllm_plugin.scheme import kernel_bias
from int4_lora.integration.vllm_plugin.served_layer import (
    ServedLayer,
    adapter_slots,
    add_eagerly,
)
from int4_lora.integration.vllm_plugin.slot_ranks import SlotRanks
from int4_lora.integration.vllm_plugin.vocabulary import patch_vocabulary_lora

__all__ = ["LAYERS", "Int4LoRALayer", "install_lora_layers"]

LINEAR_CLASSES = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
ROUTER = GateLinear  # which has a forward of its own, and may return another dtype than that of x


class Int4LoRALayer:
    """The base class that is put before each of vLLM's LoRA layers."""

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
        # a subclass may have another forward
        known = type(source_layer) in (*LINEAR_CLASSES, ROUTER)
        return (
            ours
            and known
            and super().can_replace_layer(  # type: ignore[misc]
                source_layer=source_layer,
                lora_config=lora_config,
                packed_modules_list=packed_modules_list,
                model_config=model_config,
            )
        )

    @property
    def served(self) -> ServedLayer:
        """The plug-in's state of the layer."""
        served: ServedLayer = self.base_layer.int4_lora
        return served

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """Make the slots of the adapters; compile and check everything that will run."""
        super().create_lora_weights(max_loras, lora_config, model_config)  # type: ignore[misc]
        served = self.served
        if served.has_stock_adapters:
            return  # the slots keep vLLM's layout
        served.lora, views = adapter_slots(self.lora_a_stacked, self.lora_b_stacked)
        bias = kernel_bias(self.base_layer)
        served.lora_fallback_reason = served.adapters_fault(served.lora, bias)
        if served.lora_fallback_reason is None:
            self.lora_b_stacked = views
            served.read_at_ranks(bias)
        else:  # vLLM's operators on a GPU take its own layout only
            served.lora = None

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Take vLLM's operators, which hold the slot of each token."""
        super().set_mapping(punica_wrapper)  # type: ignore[misc]
        self.served.operators = punica_wrapper

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put an adapter in a slot."""
        served = self.served
        if served.slot_ranks is None:
            super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
        else:
            self._fill(served.slot_ranks, index, lora_a, lora_b)
        last_name = served.name.rpartition(".")[2]
        parts = served.engine.packed_modules.get(last_name, [last_name])
        if isinstance(lora_a, list) and len(lora_a) == len(parts):
            parts = [part for part, a in zip(parts, lora_a, strict=True) if a is not None]
        served.engine.warn_outside_targets(served, tuple(parts))

    def _fill(self, ranks: SlotRanks[PreparedLoRA], index: int, lora_a: Any, lora_b: Any) -> None:
        """Let vLLM fill a slot, which it empties before, and note what is in it."""
        finite = self.served.engine.finite.of(_parts(lora_b), self.lora_b_stacked[0].dtype)
        if not finite:
            ranks.note_finite(index, False)
        try:
            super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
        except BaseException:
            ranks.note_unknown(index)
            raise
        of_a = (a.shape[0] for a in _parts(lora_a))
        of_b = (b.shape[1] for b in _parts(lora_b))
        ranks.note(index, max((*of_a, *of_b), default=0))
        ranks.note_finite(index, finite)

    def reset_lora(self, index: int) -> None:
        """Empty a slot: as much of it as its adapter fills."""
        ranks = self.served.slot_ranks
        if ranks is None:
            super().reset_lora(index)  # type: ignore[misc]
            return
        rank = ranks.rank(index)
        for a, b in zip(self.lora_a_stacked, self.lora_b_stacked, strict=True):
            a[index, 0, :rank] = 0
            b[index, 0, :, :rank] = 0
        ranks.note(index, 0)
        ranks.note_finite(index, True)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer with each token's adapter: x ``[..., in_features]``."""
        served = self.served
        failed_on_gpu = served.lora_fallback_reason is not None and x.device.type != "cpu"
        if failed_on_gpu or served.has_stock_adapters:
            return super().apply(x, bias)  # type: ignore[misc]
        rows = x.flatten(0, -2)
        adapter_ids = self.punica_wrapper._token_lora_indices[: rows.shape[0]]
        if served.weight is not None and served.lora_fallback_reason is None:
            y = served.forward(rows, adapter_ids, bias)
        else:
            base = self._base(rows, bias)
            if served.lora_fallback_reason is None and base.dtype == rows.dtype:
                y = served.add_adapters(base, rows, adapter_ids)
            else:  # vLLM <= 0.32's operators for CPUs take -1 for the last slot
                y = add_eagerly(base, rows, adapter_ids, self.lora_a_stacked, self.lora_b_stacked)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _base(self, rows: Tensor, bias: Tensor | None) -> Any:
        """Return the base as vLLM computes it."""
        layer = self.base_layer
        if type(layer) in LINEAR_CLASSES:
            return layer.quant_method.apply(layer, rows, bias)
        output = layer(rows)  # of a router, with its bias unless it returns that
        return output[0] if isinstance(output, tuple) else output

    def _check_int4_quantization(self) -> bool:
        """Return whether the base weight is an INT4 weight of the checkpoint."""
        return self.served.int4

    def get_unpacked_weights(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense base weight, bit for bit what the checkpoint says.

        Args:
            dtype: of the result; None means the scales' dtype.

        Returns:
            ``[out_features, in_features]`` of this rank, merged as the layer is. Shared with every
            caller while the cache keeps it: do not write to it.

        Raises:
            TypeError: the base weight is no INT4 weight.
        """
        if not self._check_int4_quantization():
            raise TypeError(
                f"{self.served.name} has no INT4 weight: it is {self.served.fallback_reason}"
            )
        return dense_weight(self.base_layer, dtype)


def _parts(lora: Any) -> list[Tensor]:
    """Return the tensors of an adapter's A or B, which of a merged layer is a list with None."""
    parts = lora if isinstance(lora, (list, tuple)) else [lora]
    return [part for part in parts if part is not None]


def _our_class(name: str) -> type:
    """Return our class for one of vLLM's LoRA layers."""
    bases = (Int4LoRALayer, getattr(vllm_lora_layers, name))
    return type(f"Int4{name}", bases, {"__module__": __name__})


LAYERS = tuple(_our_class(name) for name in LORA_CLASSES)
OUR_LAYERS = (Int4LoRALayer, Int4ExpertsLoRALayer)


def install_lora_layers() -> None:
    """Put our layers before vLLM's, once a process.

    Log the summary when vLLM has wrapped all layers, and a warning of adapters that match none.
    Adapters in INT4 are dequantised when they are loaded.
    """
    if LAYERS[0] in vllm_lora_utils._all_lora_classes:
        return
    vllm_lora_utils._all_lora_classes = (
        *LAYERS,
        *EXPERTS_LAYERS,
        *vllm_lora_utils._all_lora_classes,
    )
    create = LoRAModelManager._create_lora_modules

    @functools.wraps(create)
    def create_and_log(self: Any) -> None:
        _serve_unconfigured_layers(self.model)
        create(self)
        ours = [module for module in self.modules.values() if isinstance(module, OUR_LAYERS)]
        for module in self.modules.values() if ours else ():
            patch_vocabulary_lora(module)
        for module in ours:
            if isinstance(module, Int4ExpertsLoRALayer):
                module.share_router()
            module.served.engine.complete()

    LoRAModelManager._create_lora_modules = create_and_log
    load = WorkerLoRAManager._load_adapter

    @functools.wraps(load)
    def load_and_compare(self: Any, lora_request: Any) -> Any:
        with loadable_folder(lora_request.lora_path) as folder:
            request = copy.copy(lora_request)
            request.lora_path = folder
            with torch.inference_mode(False), torch.no_grad():  # so that writes to it are counted
                adapter = load(self, request)
        manager = self._adapter_manager
        ours = (layer for layer in manager.modules.values() if isinstance(layer, OUR_LAYERS))
        for layer in itertools.islice(ours, 1):
            layer.served.engine.warn_unmatched(
                lora_request.lora_name,
                lora_request.lora_path,
                list(adapter.loras),
                _modules_with_lora(manager),
            )
        return adapter

    WorkerLoRAManager._load_adapter = load_and_compare


def _serve_unconfigured_layers(model: Any) -> None:
    """Serve the linear layers that vLLM makes without a configuration, as Mixtral's router.

    Args:
        model: vLLM's, whose other layers tell whether it is ours.
    """
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, LinearBase)}
    states = (getattr(layer, "int4_lora", None) for layer in linear.values())
    engine = next((one.engine for one in states if isinstance(one, ServedLayer)), None)
    for name, layer in linear.items():
        if engine is not None and not hasattr(layer, "int4_lora"):
            layer.int4_lora = ServedLayer(name, engine, fallback_reason="not quantised")
            engine.layers.append(layer.int4_lora)


def _modules_with_lora(manager: Any) -> set[str]:
    """Return the modules that vLLM's LoRA layers are made of, under the names of adapters.

    Args:
        manager: vLLM's LoRAModelManager.
    """
    names = {*manager.modules, *itertools.chain.from_iterable(manager.packed_modules.values())}
    names |= {f"{name}.base_layer" for name in manager.modules if name.endswith(".experts")}
    if manager.is_pooling_model:  # vLLM looks for them without this prefix, too
        names |= {name.removeprefix("model.") for name in names}
    return names
