"""Load an INT4 model of transformers and keep it packed.

Source: ``PreTrainedModel.from_pretrained`` of transformers.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers

from int4_lora.integration.checkpoint.open import open_checkpoint
from int4_lora.integration.checkpoint.other_schemes import OTHER_SCHEMES
from int4_lora.integration.huggingface.checkpoint_of_model import folder_of
from int4_lora.integration.huggingface.converted import from_converted
from int4_lora.integration.huggingface.fused_experts import experts_left_out
from int4_lora.integration.huggingface.keep import keep_packed
from int4_lora.integration.huggingface.zero_points import packed_zero_points

__all__ = ["load_packed", "model_class"]

PLACE = ("cache_dir", "subfolder")  # where the checkpoint is: the model does not say
SHARED = (  # the arguments that the config is loaded with, too
    "cache_dir",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_packed(path_or_id: str | os.PathLike[str], **from_pretrained: Any) -> Any:
    """Load an INT4 or INT8 checkpoint with transformers; its linears and experts stay packed.

    A checkpoint of AWQ or GPTQ is converted in memory, as ``int4-lora convert`` writes it.

    The class is the one that ``config.json`` names in ``architectures``, or that
    ``AutoModelForCausalLM`` finds. Unless ``dtype`` is given, it is the checkpoint's.

    Args:
        path_or_id: the checkpoint's folder, or its name on the hub.
        from_pretrained: the other arguments of transformers' ``from_pretrained``.

    Returns:
        The model, as ``keep_packed`` returns it; with ``output_loading_info=True`` a pair of it and
        what transformers tells of the loading.

    Raises:
        OSError: the checkpoint is not there.
        ValueError: as in ``keep_packed``.

    Example:
        >>> model = load_packed("my-model-W4A16")  # doctest: +SKIP

    Source:
        ``AutoModelForCausalLM.from_pretrained``.
    """
    if not {"dtype", "torch_dtype"} & from_pretrained.keys():
        from_pretrained["dtype"] = "auto"
    path = os.fspath(path_or_id)
    shared = {key: from_pretrained[key] for key in SHARED if key in from_pretrained}
    config = transformers.AutoConfig.from_pretrained(path, **shared)
    place = {key: from_pretrained[key] for key in PLACE if from_pretrained.get(key)}
    folder = folder_of(path, config, **place) if _is_of_another_method(config) else None
    source = None if folder is None else open_checkpoint(folder)
    with packed_zero_points(), experts_left_out(source):
        kind = model_class(config)
        if source is None:
            loaded = kind.from_pretrained(path, **from_pretrained)
        else:
            loaded = from_converted(kind, source, config, from_pretrained)
    model, *told = loaded if from_pretrained.get("output_loading_info") else (loaded,)
    asked = from_pretrained.get("dtype", from_pretrained.get("torch_dtype"))
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if isinstance(dtype, torch.dtype):
        _cast_the_rest(model, dtype)
    if place and folder is None:
        folder = folder_of(path, model.config, **place)
    kept = keep_packed(model, folder)
    return (kept, *told) if told else kept


def _is_of_another_method(config: Any) -> bool:
    """Return whether a config is that of an AWQ or GPTQ checkpoint."""
    quantization = getattr(config, "quantization_config", None)
    return isinstance(quantization, dict) and quantization.get("quant_method") in OTHER_SCHEMES


def model_class(config: Any) -> Any:
    """Return the class of transformers for a model: that of its config, or the automatic class.

    Args:
        config: the model's config.
    """
    classes = [getattr(transformers, name, None) for name in config.architectures or ()]
    return next(filter(None, classes), transformers.AutoModelForCausalLM)


@torch.no_grad()
def _cast_the_rest(model: Any, dtype: torch.dtype) -> None:
    """Cast the parameters that transformers left in the checkpoint's dtype.

    In quantised models transformers 5 does that with the experts that it fuses, and 5.19 also with
    every tensor that it renames; a forward with mixed dtypes then fails. What transformers keeps in
    float32 on purpose stays so, and so do NVFP4's global scales, which it does not cast.
    """
    wide: set[str] = set()
    if dtype != torch.float32:
        wide |= set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        wide |= set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if (
            parameter.is_floating_point()
            and parameter.element_size() > 1  # FP8
            and not name.endswith("_global_scale")
            and not any(part in name for part in wide)
        ):
            parameter.data = parameter.data.to(dtype)
