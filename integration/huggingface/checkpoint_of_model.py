"""The checkpoint that a model of transformers was loaded from.

Source: ``PreTrainedModel.name_or_path``, and ``config._commit_hash`` for models of the hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from int4_lora.integration.checkpoint.hub import local_folder
from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint

__all__ = ["checkpoint_of", "folder_of"]

WAY_OUT = "name its folder with keep_packed(model, checkpoint=FOLDER)"


def checkpoint_of(model: nn.Module, given: str | os.PathLike[str] | None) -> Checkpoint:
    """Open the checkpoint of a model.

    Args:
        model: a model of transformers.
        given: the checkpoint's folder or its name on the hub; None for the place that the model
            was loaded from.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: the model does not know where it was loaded from, or the checkpoint cannot be
            read.
    """
    if given is not None:
        return open_checkpoint(given)
    name = getattr(model, "name_or_path", "")
    if not isinstance(name, str) or not name:
        raise ValueError(f"the model does not say which checkpoint it was loaded from: {WAY_OUT}")
    try:
        return open_checkpoint(folder_of(name, getattr(model, "config", None)))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the scales are read from the checkpoint, and {error}: {WAY_OUT}"
        ) from error


def folder_of(
    name: str,
    config: Any,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str = "",
) -> Path:
    """Return the folder of a model, on the hub that of the revision that was loaded.

    Args:
        name: the model's folder, or its name on the hub.
        config: the config of the model that was loaded.
        cache_dir: the hub's cache from which it was loaded; None for ``HF_HUB_CACHE``.
        subfolder: the folder of the checkpoint in that of the model.

    Raises:
        FileNotFoundError: the folder is not there.
    """
    commit = getattr(config, "_commit_hash", None)
    revision = commit if isinstance(commit, str) else None
    return local_folder(name, revision=revision, cache_dir=cache_dir, subfolder=subfolder)
