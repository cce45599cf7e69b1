"""Load an INT4 model of transformers and keep it packed.

Source: ``PreTrainedModel.from_pretrained`` of transformers.
"""

from __future__ import annotations

import os
from typing import Any

import transformers

from int4_lora.integration.huggingface.keep import keep_packed

__all__ = ["load_packed"]


def load_packed(path_or_id: str | os.PathLike[str], **from_pretrained: Any) -> Any:
    """Load an INT4 checkpoint with transformers; its INT4 linears stay packed.

    The class is the one that ``config.json`` names in ``architectures``, or that
    ``AutoModelForCausalLM`` finds. Unless ``dtype`` is given, it is the checkpoint's.

    Args:
        path_or_id: the checkpoint's folder, or its name on the hub.
        from_pretrained: the other arguments of transformers' ``from_pretrained``.

    Returns:
        The model, as ``keep_packed`` returns it.

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
    shared = {
        key: value
        for key, value in from_pretrained.items()
        if key in ("revision", "cache_dir", "subfolder", "token", "trust_remote_code", "proxies")
    }
    config = transformers.AutoConfig.from_pretrained(path, **shared)
    classes = [getattr(transformers, name, None) for name in config.architectures or ()]
    kind = next(filter(None, classes), transformers.AutoModelForCausalLM)
    return keep_packed(kind.from_pretrained(path, **from_pretrained))
