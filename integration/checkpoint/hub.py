"""Find a checkpoint by its Hugging Face hub name, in the local cache or by download.

Source: ``huggingface_hub.snapshot_download``, https://huggingface.co/docs/huggingface_hub.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE

__all__ = ["local_folder"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NEEDED = ["*.json", "*.safetensors"]  # never pickles


def local_folder(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    subfolder: str = "",
) -> Path:
    """Return the folder that ``path`` names; download it if it is a model on the hub.

    An existing folder is returned unchanged. Otherwise ``owner/name`` is looked up in the hub's
    local cache; if it is not there, it is downloaded with a progress bar, unless ``HF_HUB_OFFLINE``
    is set. ``HF_HUB_CACHE`` and ``HF_ENDPOINT`` apply.

    Args:
        path: a folder, or ``owner/name``.
        revision: the branch, tag or commit on the hub; None for its main branch.
        cache_dir: the hub's cache; None for ``HF_HUB_CACHE``.
        subfolder: the folder of the checkpoint in that of the model.

    Returns:
        The folder, which exists.

    Raises:
        FileNotFoundError: ``path`` is not a folder, and the model is neither in the cache nor can
            it be downloaded; or it has no such ``subfolder``.
        ImportError: ``path`` is a hub name, and huggingface_hub is not installed.

    Example:
        >>> local_folder(".")
        PosixPath('.')
    """
    folder = Path(path)
    if folder.is_dir():
        return _inner(folder, subfolder)
    name = os.fspath(path)
    if folder.exists() or not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{folder} is not a folder with a checkpoint")
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"{name} is no folder; huggingface_hub is needed to look it up on the hub"
        ) from error
    try:
        cached = Path(
            hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=NEEDED,
                local_files_only=True,
            )
        )
        if _is_whole(cached / subfolder):
            return cached / subfolder
    except Exception:  # not in the cache
        pass
    try:
        loaded = hub.snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=NEEDED
        )
    except Exception as error:  # the network, the hub and its client raise different exceptions
        detail = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise FileNotFoundError(
            f"{name} is no folder, not in the hub's cache, and cannot be downloaded: {detail}"
        ) from error
    return _inner(Path(loaded), subfolder)


def _inner(folder: Path, subfolder: str) -> Path:
    """Return a folder's subfolder, which must exist."""
    inner = folder / subfolder
    if not inner.is_dir():
        raise FileNotFoundError(f"{inner} is not a folder with a checkpoint")
    return inner


def _is_whole(folder: Path) -> bool:
    """Return whether a snapshot has all files; some tools download config.json alone."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / INDEX_FILE
    if not index.is_file():
        return (folder / SINGLE_FILE).is_file()
    weight_map = read_json_object(index).get("weight_map")
    shards = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    return all(isinstance(shard, str) and (folder / shard).is_file() for shard in shards)
