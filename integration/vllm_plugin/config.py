"""The configuration that ``--quantization int4_lora`` selects: vLLM's, with our INT4 scheme.

Source: vLLM's ``CompressedTensorsConfig``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from int4_lora.integration.checkpoint.scheme import PACKED_FORMAT, Scheme, read_actorder
from int4_lora.integration.vllm_plugin.converted_scheme import ConvertedScheme
from int4_lora.integration.vllm_plugin.experts_method import Int4ExpertsMethod, refuse_experts
from int4_lora.integration.vllm_plugin.float4_scheme import Float4Scheme
from int4_lora.integration.vllm_plugin.lora_layers import install_lora_layers
from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata, read_metadata
from int4_lora.integration.vllm_plugin.other_methods import (
    CONVERT,
    dense_modules,
    in_terms_of_compressed_tensors,
    read_source,
)
from int4_lora.integration.vllm_plugin.quantised_vocabulary import (
    QuantisedEmbedding,
    give_weight_for_lora,
)
from int4_lora.integration.vllm_plugin.scheme import Int4Scheme
from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
from int4_lora.integration.vllm_plugin.served_experts import ServedExperts
from int4_lora.integration.vllm_plugin.served_layer import ServedLayer

__all__ = ["Int4LoRAConfig"]

PACKED_BITS = (4, 8)


class Int4LoRAConfig(CompressedTensorsConfig):
    """compressed-tensors' configuration, its INT4 linears computed by ``int4_lora.compiled``.

    That of an AWQ or GPTQ checkpoint is put in the terms of compressed-tensors.
    """

    metadata = LoRAMetadata()
    source: Scheme | None = None  # of an AWQ or GPTQ checkpoint
    _engine: ServedEngine | None = None
    _ordered_targets: frozenset[str] = frozenset()  # whose weights have a g_idx

    @property
    def lora_compatible(self) -> bool | None:
        """The checkpoint's ``lora_compatible``, or None."""
        return self.metadata.compatible

    @property
    def lora_target_modules(self) -> tuple[str, ...] | None:
        """The checkpoint's ``lora_target_modules``, or None."""
        return self.metadata.target_modules

    def is_lora_compatible(self) -> bool:
        """Return whether the model takes adapters on packed layers.

        The checkpoint's ``lora_compatible`` decides. Where it is absent: whether the model has a
        packed linear layer of 4 or 8 bits, or, before its layers are built, whether the config has
        a group of such weights. On a GPU, vLLM computes the base of 8 bits.
        """
        if self.metadata.compatible is not None:
            return self.metadata.compatible
        if self._engine is not None:
            return self._engine.has_packed
        groups = (scheme for scheme in self.target_scheme_map.values() if scheme)
        return any(_is_packed(scheme) for scheme in groups)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Int4LoRAConfig:
        """Read a checkpoint's quantisation.

        Raises:
            ValueError: something of the checkpoint is refused.
        """
        if config.get("transform_config"):
            raise ValueError(
                "int4_lora does not take transforms (transform_config of config.json): quantise "
                "without them, or leave out --quantization int4_lora"
            )
        source = read_source(config)
        if source is not None:
            config = in_terms_of_compressed_tensors(config, source)
        groups, ordered = config.get("config_groups", {}), set()
        for group in groups.values():
            if read_actorder((group.get("weights") or {}).get("actorder")) == "group":
                ordered |= set(group.get("targets") or ())
        made = super().from_config({**config, "config_groups": _without_order(groups)})
        assert isinstance(made, Int4LoRAConfig)
        made._ordered_targets, made.source = frozenset(ordered), source
        return made

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read what the checkpoint says about adapters."""
        super().maybe_update_config(model_name, hf_config=hf_config, revision=revision)
        config = {} if hf_config is None else hf_config.to_dict()
        folder = Path(model_name)
        self.metadata = read_metadata(config, folder if folder.is_dir() else None)
        if self.source is not None and folder.is_dir():
            self.ignore: list[str] = [*self.ignore, *dense_modules(folder)]

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Load every tensor. From 0.32 on, vLLM's own mapper discards those named ``g_idx``."""
        return WeightsMapper()

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Return vLLM's method for a layer, or ours for a quantised embedding; record the layer."""
        engine = self._engine_of_process()
        if isinstance(layer, LinearBase):
            layer.int4_lora = ServedLayer(prefix, engine)
            engine.layers.append(layer.int4_lora)
        if isinstance(layer, RoutedExperts):
            layer.int4_lora = ServedExperts(prefix, engine)
            engine.experts.append(layer.int4_lora)
            ours = self._method_of_experts(layer, prefix)
            if ours is not None:
                return ours
        method = super().get_quant_method(layer, prefix)
        if method is None or not isinstance(layer, VocabParallelEmbedding):
            return method
        if engine.lora_enabled:
            give_weight_for_lora(layer)
        looked_up = not isinstance(layer, ParallelLMHead)
        if looked_up and engine.device == "cpu" and getattr(method, "num_bits", None) == 4:
            return QuantisedEmbedding(method)
        return method

    def get_scheme(self, layer: Any, layer_name: str | None = None) -> Any:
        """Return our scheme for linears of INT4, or on a CPU INT8 or FP4; vLLM's for others."""
        if isinstance(layer, LinearBase) and layer.int4_lora.engine.device == "cpu":
            name = _float4_of(self.get_scheme_dict(layer, layer_name))
            if name is not None:  # vLLM's choice of a kernel raises
                layer.int4_lora.int4, layer.int4_lora.fallback_reason = True, None
                return Float4Scheme(name, layer.int4_lora)
        scheme = super().get_scheme(layer, layer_name)
        if not isinstance(layer, LinearBase) or scheme is None:
            return scheme
        served: ServedLayer = layer.int4_lora
        if type(scheme) is not CompressedTensorsWNA16:
            served.fallback_reason = type(scheme).__name__
            return scheme
        served.packed = scheme.num_bits in PACKED_BITS
        if scheme.num_bits not in _bits_of(served.engine.device):
            served.fallback_reason = f"of {scheme.num_bits} bits"
            return scheme
        served.int4, served.fallback_reason = True, None
        if self.source is not None:
            return ConvertedScheme(scheme, served, self.source)
        matched = self.get_scheme_dict(layer, layer_name)
        ordered = any(self.target_scheme_map[name] is matched for name in self._ordered_targets)
        return Int4Scheme(scheme, served, ordered=ordered)

    def _method_of_experts(self, layer: Any, prefix: str) -> Int4ExpertsMethod | None:
        """Return our method for INT4 experts, or on a CPU INT8; None to leave them to vLLM.

        Raises:
            ValueError: an expert's modules have different schemes, or ours refuses the layer.
        """
        served: ServedExperts = layer.int4_lora
        if self.source is not None:
            raise ValueError(
                f"int4_lora: {prefix} is a mixture of experts, whose tensors are not converted "
                f"at load: {CONVERT}"
            )
        self._add_fused_moe_to_target_scheme_map()
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        matched = [self.get_scheme_dict(layer, f"{prefix}.0.{name}") for name in names]
        if any(scheme != matched[0] for scheme in matched):
            raise ValueError(
                f"int4_lora: {', '.join(map(str, names))} of the experts of {prefix} must be "
                "quantised alike: vLLM holds them in one tensor"
            )
        scheme = matched[0]
        weights = None if scheme is None else scheme.get("weights")
        if scheme is None or weights is None:
            return None
        packed = scheme.get("format") == PACKED_FORMAT and self._is_wNa16_group_channel(
            weights, scheme.get("input_activations")
        )
        if not packed or weights.num_bits not in (4, 8):
            served.fallback_reason = f"of {weights.num_bits} bits, {scheme.get('format')}"
            return None
        if served.engine.device != "cpu":
            served.fallback_reason = "on a GPU"
            return None
        if served.engine.options.backend == "stock-base":
            served.fallback_reason = "as the option backend asks"
            return None
        ordered = any(self.target_scheme_map[name] is scheme for name in self._ordered_targets)
        refuse_experts(prefix, layer.moe_config, ordered=ordered)
        served.int4 = True
        return Int4ExpertsMethod(weights, layer.moe_config, served)

    def _engine_of_process(self) -> ServedEngine:
        """Return the engine's state, made with the first layer."""
        if self._engine is None:
            self._engine = ServedEngine.from_vllm(
                get_current_vllm_config(), self.metadata, self.packed_modules_mapping
            )
            install_lora_layers()
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        """Leave the engine's state behind: it belongs to the process that runs the layers."""
        return {name: value for name, value in self.__dict__.items() if name != "_engine"}


def _is_packed(scheme: Any) -> bool:
    """Return whether a config group quantises weights alone, to whole numbers of 4 or 8 bits."""
    weights = scheme.get("weights")
    return (
        getattr(weights, "num_bits", None) in PACKED_BITS
        and bool(getattr(weights, "type", None) == "int")
        and scheme.get("input_activations") is None
    )


def _bits_of(device: str) -> tuple[int, ...]:
    """Return the bits of the weights that ours computes on a type of device.

    On a GPU, vLLM's own kernels take 8 bits. On a CPU it has none.
    """
    return PACKED_BITS if device == "cpu" else (4,)


def _float4_of(matched: dict[str, Any] | None) -> Literal["nvfp4", "mxfp4"] | None:
    """Return the format of a group of weight-only FP4, or None for any other group."""
    weights = (matched or {}).get("weights")
    if weights is None or (matched or {}).get("input_activations") is not None:
        return None
    if (weights.num_bits, weights.type, weights.symmetric) != (4, "float", True):
        return None
    if (weights.strategy, weights.group_size) == ("tensor_group", 16):
        return "nvfp4"
    return "mxfp4" if (weights.strategy, weights.group_size) == ("group", 32) else None


def _without_order(groups: dict[str, Any]) -> dict[str, Any]:
    """Return groups of a config without activation order, which vLLM refuses to read."""
    return {
        name: {**group, "weights": {**group["weights"], "actorder": None}}
        if group.get("weights")
        else group
        for name, group in groups.items()
    }
