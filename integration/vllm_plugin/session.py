"""What all layers of one engine share, in the process that runs them: options, cache and log.

Source: ``docs/vllm.md``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger

from int4_lora.integration.checkpoint.cache import UnpackedWeightCache
from int4_lora.integration.checkpoint.hub import local_folder
from int4_lora.integration.vllm_plugin.load_check import bucket_tokens
from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata, outside_targets
from int4_lora.integration.vllm_plugin.options import Options, read_options
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer
from int4_lora.integration.vllm_plugin.serving_state import as_when_serving
from int4_lora.reference import PackedWeight

__all__ = ["Session", "logger", "refuse_settings"]

logger = init_logger("vllm.int4_lora")  # below vLLM's own logger, whose settings it takes


Look = Callable[[int], str | None]
GraphOf = Callable[[int], Hashable]


class Session:
    """One engine's options, cache and layers.

    Args:
        vllm_config: vLLM's whole configuration.
        metadata: what the checkpoint says about adapters.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option that does not exist, or a setting of vLLM that is refused.
    """

    def __init__(self, vllm_config: Any, metadata: LoRAMetadata) -> None:
        self.options: Options = read_options(vllm_config.additional_config)
        self.metadata = metadata
        self.model: str = vllm_config.model_config.model
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.most_tokens: int = vllm_config.scheduler_config.max_num_batched_tokens
        self.by_name: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self.adapters = vllm_config.lora_config is not None
        self.cache = UnpackedWeightCache(self.options.cache_bytes)
        self.layers: list[ServedLayer] = []
        self.packed: dict[str, PackedWeight] = {}  # those that the cache holds the dense weight of
        self.packed_modules: Mapping[str, list[str]] = {}  # what merged layers are merged of
        self._loaded: set[str] = set()
        self.faults: dict[Hashable, str | None] = {}  # of each kind of layer, None for none
        self._warned: set[tuple[str, ...]] = set()
        self._announced = False
        refuse_settings(vllm_config)
        if self.adapters and metadata.compatible is False:
            logger.warning(
                "int4_lora: %s says lora_compatible: false, and LoRA is enabled", self.model
            )

    def folder(self) -> Path:
        """Return the checkpoint's folder; a name on the hub is looked up in its cache."""
        return local_folder(self.model)

    def loaded_one(self, layer: ServedLayer) -> None:
        """Note that a layer's weight is there; log when it was the last and no adapters follow."""
        self._loaded.add(layer.name)
        if not self.adapters and self._loaded >= {one.name for one in self.layers if one.int4}:
            self.announce()

    def fault(self, key: Hashable, name: str, graph_of: GraphOf, look: Look) -> str | None:
        """Return what is wrong with a kind of layer, found out once for each kind.

        Running it at every number of tokens that has a graph of its own also compiles the graphs.

        Args:
            key: what the kind is told by.
            name: the first layer of the kind, for the log.
            graph_of: what its graph is told by, at a number of tokens.
            look: what is wrong at a number of tokens, or None.
        """
        if key not in self.faults:
            most = self.most_tokens if self.options.warm_up else 1
            self.faults[key] = None
            for tokens in bucket_tokens(most, graph_of):
                self.faults[key] = self.faults[key] or _tried(look, tokens)
            if self.faults[key] is not None:
                logger.warning("int4_lora: %s is left to vLLM: %s", name, self.faults[key])
        return self.faults[key]

    def warn_outside(self, layer: ServedLayer, parts: tuple[str, ...]) -> None:
        """Warn, once, of an adapter on modules that ``lora_target_modules`` leaves out."""
        outside = tuple(outside_targets(self.metadata, layer.name, parts))
        if outside and outside not in self._warned:
            self._warned.add(outside)
            logger.warning(
                "int4_lora: an adapter targets %s (first at %s), which lora_target_modules of the "
                "checkpoint does not name: %s",
                ", ".join(outside),
                layer.name,
                ", ".join(self.metadata.target_modules or ()),
            )

    def announce(self) -> None:
        """Log, once, how many layers run how, and why."""
        if self._announced:
            return
        self._announced = True
        for line in self.summary():
            logger.info("int4_lora: %s", line)

    def summary(self) -> list[str]:
        """Return what there is to say of the layers: a line that counts, and the GPU's warning."""
        fused = [one for one in self.layers if one.weight is not None]
        stock = Counter(one.stock_because for one in self.layers if one.weight is None)
        own = Counter(
            one.stock_lora_because for one in self.layers if one.stock_lora_because is not None
        )
        line = f"{len(fused)} of {len(self.layers)} linear layers fused (INT4 base, adapters)"
        if stock:
            reasons = "; ".join(f"{count} {reason}" for reason, count in stock.most_common())
            line += f"; {sum(stock.values())} on vLLM's base kernel: {reasons}"
        if own:
            reasons = "; ".join(f"{count} {reason}" for reason, count in own.most_common())
            line += f"; {sum(own.values())} with plain, slow LoRA: {reasons}"
        on_gpu = [
            one for one in fused if one.weight is not None and one.weight.device.type != "cpu"
        ]
        if on_gpu:
            return [line, "on CUDA this backend is experimental: it never ran in vLLM on a GPU"]
        return [line]


def _tried(look: Look, tokens: int) -> str | None:
    """Return what is wrong at a number of tokens, an exception included."""
    try:
        with as_when_serving():
            return look(tokens)
    except Exception as error:  # Inductor raises whatever its compilers do
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def refuse_settings(vllm_config: Any) -> None:
    """Refuse settings of vLLM that the backend would make wrong.

    Raises:
        ValueError: one of them; the message says what to do.
    """
    if vllm_config.model_config.enable_sleep_mode:
        raise ValueError("int4_lora does not take sleep mode: leave out --enable-sleep-mode")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "int4_lora does not take pipeline parallelism, which was never run with it: leave out "
            "--pipeline-parallel-size"
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.fully_sharded_loras:
        raise ValueError(
            "int4_lora does not take fully sharded LoRA: leave out --fully-sharded-loras"
        )
    if lora is not None and os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") not in ("", "0"):
        raise ValueError(
            "int4_lora does not take LoRA on a second stream: unset VLLM_LORA_ENABLE_DUAL_STREAM"
        )
