"""The plug-in's state of one engine, in the process that runs its layers.

Source: ``docs/vllm.md``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.cache import UnpackedWeightCache
from int4_lora.integration.checkpoint.hub import local_folder
from int4_lora.integration.vllm_plugin.adapter_names import unmatched_warning
from int4_lora.integration.vllm_plugin.base_choice import Choice
from int4_lora.integration.vllm_plugin.finite_weights import FiniteWeights
from int4_lora.integration.vllm_plugin.kept_graphs import KeptGraphs, can_keep_graphs
from int4_lora.integration.vllm_plugin.load_check import tokens_of_each_graph
from int4_lora.integration.vllm_plugin.metadata import LoRAMetadata, outside_targets
from int4_lora.integration.vllm_plugin.options import Options, read_options
from int4_lora.integration.vllm_plugin.serving_state import as_when_serving

if TYPE_CHECKING:
    from int4_lora.integration.vllm_plugin.served_experts import ServedExperts
    from int4_lora.integration.vllm_plugin.served_layer import ServedLayer
    from int4_lora.integration.vllm_plugin.stock_trial import Kind

__all__ = ["ServedEngine", "logger", "refuse_settings"]

KERNELS = "int4_lora_kernels"  # in vLLM's additional_config
QUIET_SECONDS = 5  # between two lines of progress while layers are compiled
logger = logging.getLogger("vllm.int4_lora")  # a child of vLLM's logger, whose settings it inherits

Fault = Callable[[int], str | None]
"""A number of tokens -> what is wrong with a layer there, or None."""

Operator = Callable[..., Tensor]
"""A ``ServedLayer``, x, the tokens' adapter ids or None, the bias or None -> the layer's output."""

GraphKey = Callable[[int], Hashable]
"""A number of tokens -> the key of the graph that serves it."""


@dataclass(eq=False)
class Progress:
    """The graphs that have been compiled and checked, logged every few seconds.

    Args:
        graphs: how many so far.
        seconds: how long they took together.
        logged: the seconds at the last line of progress.
    """

    graphs: int = 0
    seconds: float = 0.0
    logged: float = 0.0

    def through(self, counts: Iterable[int], name: str) -> Iterator[int]:
        """Yield numbers of tokens, each of which stands for a graph; log what is done and next.

        Args:
            counts: the numbers of tokens.
            name: the first layer of the kind that is checked with them.
        """
        for tokens in counts:
            if self.seconds - self.logged >= QUIET_SECONDS:
                self.logged = self.seconds
                logger.info(
                    "int4_lora: %d graphs compiled and checked in %.0f s; next is %s, %d tokens",
                    self.graphs,
                    self.seconds,
                    name,
                    tokens,
                )
            start = time.monotonic()
            yield tokens
            self.graphs += 1
            self.seconds += time.monotonic() - start


@dataclass(eq=False)
class ServedEngine:
    """All that the layers of one engine share.

    Args:
        options: the operator's.
        metadata: what the checkpoint says about adapters.
        model: the checkpoint's folder, or its name on the hub.
        dtype: of activations.
        max_tokens: the most tokens in one step.
        lora_enabled: whether the engine serves adapters.
        slots: how many adapters are served at a time, 0 for none.
        rank: the rank that adapters are padded to.
        device: the kind of device that runs the model.
        additional_config: vLLM's, which is part of the key of its compile cache.
        forward_context: vLLM's layers by name; ``operator`` finds ours there.
        operator: runs a layer as a single operator within vLLM's torch.compile.
        packed_modules: which modules of the checkpoint vLLM merges into a layer, by its last name.
        layers: every linear layer of the model.
        experts: the experts of every layer of the model that has them.
        cache: the dense weights that ``get_unpacked_weights`` keeps.
        checked: the fault of each kind of layer that was checked, None for a correct one.
        trials: whose code computes what in each kind of layer that was measured.
        progress: what the check at load has done, and when it last logged that.
        finite: which weights of adapters are finite.
        kept: the model's graphs on disk, or None where they are not kept.
    """

    options: Options = field(default_factory=Options)
    metadata: LoRAMetadata = field(default_factory=LoRAMetadata)
    model: str = ""
    dtype: torch.dtype = torch.bfloat16
    max_tokens: int = 1
    lora_enabled: bool = False
    slots: int = 0
    rank: int = 0
    device: str = "cpu"
    additional_config: Any = None
    forward_context: dict[str, Any] = field(default_factory=dict)
    operator: Operator | None = None
    packed_modules: Mapping[str, list[str]] = field(default_factory=dict)
    layers: list[ServedLayer] = field(default_factory=list)
    experts: list[ServedExperts] = field(default_factory=list)
    cache: UnpackedWeightCache = field(default_factory=lambda: UnpackedWeightCache(0))
    checked: dict[Hashable, str | None] = field(default_factory=dict)
    trials: dict[Kind, Choice] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    finite: FiniteWeights = field(default_factory=FiniteWeights)
    kept: KeptGraphs | None = None
    _warned: set[tuple[str, ...]] = field(default_factory=set)
    _summary_logged: bool = False

    @classmethod
    def from_vllm(
        cls, vllm_config: Any, metadata: LoRAMetadata, packed_modules: Mapping[str, list[str]]
    ) -> ServedEngine:
        """Read an engine's options and settings from vLLM's configuration.

        Args:
            vllm_config: vLLM's whole configuration.
            metadata: what the checkpoint says about adapters.
            packed_modules: which modules of the checkpoint vLLM merges into a layer.

        Raises:
            TypeError: an option of the wrong type.
            ValueError: an option that does not exist, or a setting of vLLM that is refused.
        """
        from int4_lora.integration.vllm_plugin.layer_operator import run_by_name

        options = read_options(vllm_config.additional_config)
        lora = None if _is_draft(vllm_config) else vllm_config.lora_config
        engine = cls(
            options=options,
            metadata=metadata,
            model=vllm_config.model_config.model,
            dtype=vllm_config.model_config.dtype,
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            lora_enabled=lora is not None,
            slots=0 if lora is None else lora.max_loras,
            rank=0 if lora is None else lora.max_lora_rank,
            device=vllm_config.device_config.device_type,
            additional_config=vllm_config.additional_config,
            forward_context=vllm_config.compilation_config.static_forward_context,
            operator=run_by_name,
            packed_modules=packed_modules,
            cache=UnpackedWeightCache(options.cache_bytes),
        )
        refuse_settings(vllm_config)
        if engine.device == "cpu" and options.warm_up and can_keep_graphs():
            engine.kept = KeptGraphs(engine.model)
            logger.info("int4_lora: %d graphs loaded from %s", engine.kept.load(), engine.kept.file)
        if engine.lora_enabled and metadata.compatible is False:
            logger.warning(
                "int4_lora: %s says lora_compatible: false, and LoRA is enabled", engine.model
            )
        return engine

    def checkpoint_folder(self) -> Path:
        """Return the checkpoint's folder; a name on the hub is looked up in its cache."""
        return local_folder(self.model)

    @property
    def has_packed(self) -> bool:
        """Whether the model has packed linear layers, or experts that our kernels take."""
        experts = any(experts.int4 for experts in self.experts)
        return experts or any(layer.packed for layer in self.layers)

    def weight_loaded(self, layer: ServedLayer | ServedExperts) -> None:
        """Record a loaded layer; after the last, the model is complete unless it takes adapters."""
        layer.loaded = True
        known = self._all_layers()
        if not self.lora_enabled and all(layer.loaded for layer in known if layer.int4):
            self.complete()

    def _all_layers(self) -> list[ServedLayer | ServedExperts]:
        return [*self.layers, *self.experts]

    def complete(self) -> None:
        """Log the summary, and let vLLM's compile cache know which kernels run.

        vLLM keeps the graph that it compiled of a model, and takes it again for the same
        configuration. Which layers run which kernels is decided while the model loads: so that is
        put into ``additional_config``, of which vLLM makes the cache's key when it compiles.
        """
        if isinstance(self.additional_config, dict):
            kernels = [
                (
                    layer.name,
                    layer.weight is not None,
                    layer.ours_from,
                    layer.has_stock_adapters,
                    layer.lora_fallback_reason is None,
                )
                for layer in self.layers
            ]
            kernels += [
                (experts.name, experts.weight is not None, None, False, experts.slots is not None)
                for experts in self.experts
            ]
            of_models = self.additional_config.setdefault(KERNELS, {})
            of_models[self.model] = hashlib.sha256(repr(kernels).encode()).hexdigest()
        self.log_summary()

    def fault_of_kind(
        self,
        kind: Hashable,
        name: str,
        graph_key: GraphKey,
        fault: Fault,
        *,
        rows_of_a_token: int = 1,
    ) -> str | None:
        """Check a kind of layer, once, at a number of tokens for each of its graphs.

        This also compiles the graphs, so that no request waits for them.

        Args:
            kind: what layers share that need only one check.
            name: the first layer of the kind, and how it is checked, for the log.
            graph_key: the key of its graph at a number of tokens.
            fault: runs the check at a number of tokens.
            rows_of_a_token: how many rows the layer has for a token: of experts several.

        Returns:
            The first fault, or None.
        """
        if kind not in self.checked:
            max_tokens = self.max_tokens * rows_of_a_token if self.options.warm_up else 1
            counts = tokens_of_each_graph(max_tokens, graph_key)
            first = self._first_fault(counts, name, fault)
            if first is not None and self.kept is not None and self.kept.discard():
                logger.warning("int4_lora: graphs on disk are wrong, and compiled again: %s", first)
                first = self._first_fault(counts, name, fault)
            self.checked[kind] = first
            if self.checked[kind] is not None:
                logger.warning(
                    "int4_lora: %s fails the check against the reference and is not used: %s",
                    name,
                    self.checked[kind],
                )
            elif self.kept is not None:  # now, so that a start that is killed is not for nothing
                self.kept.keep()
        return self.checked[kind]

    def _first_fault(self, counts: Iterable[int], name: str, fault: Fault) -> str | None:
        """Return the first fault at some numbers of tokens, or None."""
        checks = self.progress.through(counts, name)
        with self.compiling():
            return next(filter(None, (_fault_or_error(fault, tokens) for tokens in checks)), None)

    def compiling(self) -> AbstractContextManager[None]:
        """Compile graphs in such a way that they can be kept, if they are."""
        return nullcontext() if self.kept is None else self.kept.compiling()

    def warn_outside_targets(
        self, layer: ServedLayer | ServedExperts, parts: tuple[str, ...]
    ) -> None:
        """Warn, once, of an adapter on modules that ``lora_target_modules`` does not name."""
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

    def warn_unmatched(
        self, adapter: str, path: str, names: Sequence[str], known: Collection[str]
    ) -> None:
        """Warn, once, of an adapter with modules that match no layer.

        Args:
            adapter: the name that requests give.
            path: its folder.
            names: its modules, as vLLM calls them.
            known: the modules that the model's LoRA layers are made of.
        """
        warning = unmatched_warning(names, known)
        if warning is not None and (adapter, path) not in self._warned:
            self._warned.add((adapter, path))
            logger.warning("int4_lora: adapter %s (%s): %s", adapter, path, warning)

    def log_summary(self) -> None:
        """Log, once, how many layers run how, and why."""
        if self._summary_logged:
            return
        self._summary_logged = True
        for line in self.summary():
            logger.info("int4_lora: %s", line)
        done = self.progress
        logger.info(
            "int4_lora: %d graphs compiled or loaded, and checked against the reference, in %.0f s",
            done.graphs,
            done.seconds,
        )

    def summary(self) -> list[str]:
        """Return the lines of the summary: the counts, each choice, and on a GPU a warning."""
        ours = [layer for layer in self.layers if layer.weight is not None]
        fused = [layer for layer in ours if not layer.has_stock_adapters]
        stock_adapters = sum(layer.has_stock_adapters for layer in self.layers)
        fallbacks = [layer.fallback_reason for layer in self.layers if layer.weight is None]
        lora_fallbacks = [
            layer.lora_fallback_reason
            for layer in self.layers
            if layer.lora_fallback_reason is not None
        ]
        line = f"{len(fused)} of {len(self.layers)} linear layers fused (INT4 base, adapters)"
        if fallbacks:
            line += f"; {len(fallbacks)} on vLLM's base kernel: {_counted(fallbacks)}"
        if stock_adapters:
            line += f"; {stock_adapters} with vLLM's adapters, measured faster"
        if lora_fallbacks:
            line += f"; {len(lora_fallbacks)} with plain, slow LoRA: {_counted(lora_fallbacks)}"
        quantised = sum(layer.activations_quantised for layer in self.layers)
        lines = [line, *self._experts_lines(), *self._choices()]
        if quantised:
            lines.append(
                f"{quantised} layers on vLLM's base kernel quantise activations to int8 (W4A8), "
                "another arithmetic than the checkpoint's: VLLM_CPU_INT4_W4A8=0 turns that off"
            )
        elif any(layer.stock_quantises for layer in self.layers):
            lines.append(
                "without the flag, vLLM quantises activations to int8 on this machine (W4A8); here "
                "they have 16 bits, also where vLLM's kernel was measured"
            )
        if self.device != "cpu":
            lines.append("on CUDA this backend is experimental: it never ran in vLLM on a GPU")
        return lines

    def _experts_lines(self) -> list[str]:
        """Return a line that counts the layers of experts by how they run, if there are any."""
        if not self.experts:
            return []
        ours = [experts for experts in self.experts if experts.weight is not None]
        plain = [
            experts.lora_fallback_reason or experts.fallback_reason
            for experts in self.experts
            if experts.plain is not None
        ]
        left = [
            experts.fallback_reason
            for experts in self.experts
            if experts.weight is None and experts.plain is None
        ]
        line = f"{len(ours)} of {len(self.experts)} layers of experts by int4_lora (INT4, adapters)"
        if plain:
            line += f"; {len(plain)} by the reference, slowly: {_counted(plain)}"
        if left:
            line += f"; {len(left)} by vLLM: {_counted(left)}"
        return [line]

    def _choices(self) -> list[str]:
        """Return a line for each measured kind of layer: what was chosen, and what it is worth."""
        names: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.choice is not None and layer.kind is not None and layer.follows_choice:
                shape = f"{sum(layer.kind.outputs)} x {layer.kind.inputs}"
                chosen = shape, layer.choice.description(self.slots)
                names.setdefault(chosen, []).append(layer.name.rpartition(".")[2])
        return [
            f"{len(same)} x {', '.join(sorted(set(same)))} ({shape}): {description}"
            for (shape, description), same in names.items()
        ]


def _counted(reasons: Iterable[str | None]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())


def _fault_or_error(fault: Fault, tokens: int) -> str | None:
    """Return what is wrong at a number of tokens, an exception included."""
    try:
        with as_when_serving():
            return fault(tokens)
    except Exception as error:  # Inductor raises whatever its compilers do
        return f"{type(error).__name__}: {error}".partition("\n")[0]


def _is_draft(vllm_config: Any) -> bool:
    """Return whether a configuration is of a draft model, on which vLLM puts no adapters.

    It has the LoRA settings of the model that is served. Without a draft model (``ngram``), vLLM
    names the served model itself as the draft.
    """
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is None or model is speculative.target_model_config:
        return False
    return model is speculative.draft_model_config


def refuse_settings(vllm_config: Any) -> None:
    """Refuse settings of vLLM with which answers would be wrong, or that never ran.

    Raises:
        ValueError: one of them is set; the message says what to do.
    """
    if vllm_config.model_config.enable_sleep_mode:
        raise ValueError("int4_lora does not take sleep mode: leave out --enable-sleep-mode")
    _refuse_stages(vllm_config)
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        raise ValueError(
            "int4_lora does not take VLLM_BATCH_INVARIANT, because it computes few tokens and many "
            "by different code, whose sums differ in the last bits: unset the variable, or leave "
            "out --quantization int4_lora"
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.fully_sharded_loras:
        raise ValueError(
            "int4_lora does not take fully sharded LoRA: leave out --fully-sharded-loras"
        )
    if lora is not None and os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM", "0") not in ("", "0"):
        raise ValueError(
            "int4_lora computes a layer and its adapters in one function, on one stream: unset "
            "VLLM_LORA_ENABLE_DUAL_STREAM"
        )


def _refuse_stages(vllm_config: Any) -> None:
    """Refuse pipeline stages where vLLM's engine ends at the first request.

    On a CPU, vLLM allocates the tensors that go from stage to stage in the run that compiles the
    model. Without its own compile, which LoRA turns off there, it has none.

    Raises:
        ValueError: the engine has several stages, on a CPU, and vLLM does not compile the model.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    compiles = vllm_config.compilation_config.mode != 0  # CompilationMode.NONE
    if stages == 1 or compiles or vllm_config.device_config.device_type != "cpu":
        return
    option = "--enforce-eager" if vllm_config.lora_config is None else "--enable-lora"
    raise ValueError(
        f"int4_lora: on a CPU, vLLM serves no request in pipeline stages with {option}: leave out "
        f"{option}, or --pipeline-parallel-size and use --tensor-parallel-size"
    )
