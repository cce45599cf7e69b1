"""Make a small INT4 Llama, its tokenizer and three adapters with compressed-tensors and PEFT.

The files are made once and kept in a cache folder. The weights are random; the file formats are
those that these tools write for a model of any size.

Source: ``ModelCompressor`` of compressed-tensors, ``get_peft_model`` of PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from int4_lora.atomic_files import new_folder
from int4_lora.integration.demo.tokenizer import save_tokenizer

__all__ = [
    "ADAPTERS",
    "LLAMA",
    "DemoFiles",
    "make_adapter",
    "make_model",
    "prepare",
    "save_quantised",
]

FOLDER = "demo-llama-w4a16-g128-2"  # increase the last number when the recipe changes

LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}

# Ranks, targets and scalings differ. The scalings are 2, 2/3 (no binary float) and 5 / sqrt(5).
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 12, "lora_alpha": 8, "target_modules": "all-linear"},
    "c": {
        "r": 5,
        "lora_alpha": 5,
        "use_rslora": True,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    },
}


@dataclass(frozen=True)
class DemoFiles:
    """The folders of the demo's model and adapters.

    Args:
        model: the checkpoint's folder.
        adapters: the folder of each adapter, by name.
    """

    model: Path
    adapters: Mapping[str, Path]


def prepare(cache: Path) -> DemoFiles:
    """Return the demo's files; make them first if the cache lacks them.

    The files are written to a temporary folder, which is then renamed. So a stopped run leaves no
    incomplete files in the cache, and of two concurrent runs one provides the files.

    Args:
        cache: the cache folder; it is made if it is missing.

    Returns:
        The folders of the model and the adapters.

    Raises:
        OSError: the cache cannot be written.
    """
    folder = cache / FOLDER
    if not folder.is_dir():
        try:
            with new_folder(folder) as made:
                make_model(made / "model", LLAMA, WEIGHTS)
                save_tokenizer(made / "model", length=LLAMA["max_position_embeddings"])
                for name, settings in ADAPTERS.items():
                    make_adapter(made / name, LLAMA, name, settings)
        except OSError:
            if not folder.is_dir():  # it exists if another run has renamed its folder first
                raise
    return DemoFiles(folder / "model", {name: folder / name for name in ADAPTERS})


def make_model(folder: Path, llama: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Make a random Llama, quantise its linear layers except lm_head, and save the checkpoint.

    Args:
        folder: where to save it.
        llama: arguments of transformers' ``LlamaConfig``.
        weights: arguments of compressed-tensors' ``QuantizationArgs``.
    """
    save_quantised(_dense_model(llama), folder, weights)


@torch.no_grad()
def save_quantised(model: LlamaForCausalLM, folder: Path, weights: Mapping[str, Any]) -> None:
    """Quantise a model's linear layers except lm_head by min-max, and save the checkpoint.

    Args:
        model: the dense model, which is changed.
        folder: where to save it.
        weights: arguments of compressed-tensors' ``QuantizationArgs``.
    """
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=["lm_head"],
            quantization_status=QuantizationStatus.FROZEN,
        ),
    )
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _calibrate(name, module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(str(folder))
    compressor.update_config(str(folder))


def _dense_model(llama: Mapping[str, Any]) -> Any:
    """Return a random Llama whose weight rows have offsets, so that zero-points matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**llama))
        model = model.to(torch.bfloat16).eval()
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                offsets = 0.02 * torch.randn(weight.shape[0], 1)
                weight.data.add_(offsets.to(weight.dtype))
    return model


def _calibrate(name: str, module: Any) -> None:
    """Set scales and zero-points from the extremes of each group, as a data-free observer does."""
    args = module.quantization_scheme.weights
    weight = module.weight.data
    if hasattr(module, "weight_g_idx"):
        g_idx = _activation_order(name, weight.shape[1], args.group_size)
        module.weight_g_idx.data.copy_(g_idx)
        weight = weight[:, torch.argsort(g_idx, stable=True)]
    columns = args.group_size or weight.shape[1]
    groups = weight.reshape(len(weight), -1, columns)  # [out, groups, columns]
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    module.weight_scale.data.copy_(scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero_point)


def _activation_order(name: str, columns: int, group_size: int) -> Tensor:
    """Return a g_idx of a random activation order, which differs between module names."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    order = torch.randperm(columns, generator=generator)
    return (torch.argsort(order) // group_size).to(torch.int32)


def make_adapter(
    folder: Path, llama: Mapping[str, Any], name: str, settings: Mapping[str, Any]
) -> None:
    """Make a random adapter, B included, and save it with PEFT.

    Args:
        folder: where to save it.
        llama: arguments of the base's ``LlamaConfig``.
        name: the adapter's name, which seeds it.
        settings: arguments of PEFT's ``LoraConfig``.
    """
    model = _dense_model(llama)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        peft.get_peft_model(model, config).save_pretrained(str(folder), save_embedding_layers=False)
