"""Load AWQ and GPTQ checkpoints as transformers loads those of compressed-tensors.

transformers reads AWQ and GPTQ through other packages, whose layers have no adapters of PEFT and no
gradients on a CPU. Here the tensors are converted, exactly, and given to ``from_pretrained`` with
compressed-tensors' ``quantization_config``.

Source: ``docs/commands/convert.md``; ``state_dict`` of ``PreTrainedModel.from_pretrained``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from int4_lora.integration.checkpoint.compressed_tensors import tensors_of
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.conversion.repack import modules_with_g_idx, quantization_of
from int4_lora.integration.conversion.unpack import check_all_is_read

__all__ = ["converted", "from_converted"]

FOR_FILES = (  # arguments of from_pretrained that say where files are
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "use_safetensors",
    "variant",
    "weights_only",
)


def from_converted(
    kind: Any, checkpoint: Checkpoint, config: Any, from_pretrained: dict[str, Any]
) -> Any:
    """Return what ``kind.from_pretrained`` returns for the converted tensors.

    Args:
        kind: a class of transformers.
        checkpoint: an open checkpoint of AWQ or GPTQ.
        config: the model's config; its ``quantization_config`` is replaced.
        from_pretrained: the arguments of ``from_pretrained``.

    Raises:
        ValueError: a module cannot be converted, or tensors are unlisted; the message names them.
    """
    config.quantization_config, tensors = converted(checkpoint)
    rest = {key: value for key, value in from_pretrained.items() if key not in FOR_FILES}
    rest.pop("config", None)
    loaded = kind.from_pretrained(None, config=config, state_dict=tensors, **rest)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(checkpoint.path)
    if (checkpoint.path / GENERATION_CONFIG_NAME).is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path)
    return loaded


def converted(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return compressed-tensors' ``quantization_config`` and tensors for a checkpoint.

    Args:
        checkpoint: an open checkpoint of AWQ or GPTQ.

    Returns:
        The config, and the tensors by their full names.

    Raises:
        ValueError: a module cannot be converted, or tensors are unlisted; the message names them.
    """
    checkpoint.check_listed()
    check_all_is_read(checkpoint)
    quantization = quantization_of(checkpoint, modules_with_g_idx(checkpoint))
    quantised = {full for name in checkpoint.modules() for full in checkpoint.stored(name)}
    tensors = {
        name: checkpoint.tensor(name) for name in checkpoint.tensors if name not in quantised
    }
    for name in checkpoint.modules():
        parts = tensors_of(checkpoint.packed_weight(name))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return quantization, tensors
