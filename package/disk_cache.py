"""Cache measurements on disk, in one small JSON file per key.

Each file is replaced atomically and no two keys share a file, so neither readers nor writers need a
lock. A file that is missing, damaged or of another key is a miss. If the folder cannot be written,
measurements are repeated, without an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from int4_lora.atomic_files import replace_files

__all__ = ["cache_folder", "check_writable", "recall", "remember"]


def cache_folder() -> Path:
    """Return ``$INT4_LORA_CACHE``, ``$XDG_CACHE_HOME/int4-lora`` or ``~/.cache/int4-lora``."""
    chosen = os.environ.get("INT4_LORA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "int4-lora"


def recall(kind: str, key: Mapping[str, Any]) -> Any:
    """Return the value last stored under a key, or None.

    Args:
        kind: the name of the folder for values of this kind.
        key: everything that the value depends on, as JSON types.
    """
    try:
        kept = json.loads(_file(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return None  # RuntimeError if there is no home directory
    same = isinstance(kept, dict) and kept.get("key") == json.loads(_text(key))
    return kept.get("value") if same else None


def remember(kind: str, key: Mapping[str, Any], value: Any) -> bool:
    """Store a value under a key.

    Args:
        kind: the name of the folder for values of this kind.
        key: everything that the value depends on, as JSON types.
        value: the value, as JSON types.

    Returns:
        Whether the value could be written.
    """
    try:
        file = _file(kind, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_files({file: json.dumps({"key": key, "value": value}, indent=1).encode()})
    except (OSError, RuntimeError):  # RuntimeError if there is no home directory
        return False
    return True


def check_writable() -> None:
    """Check that the cache can be written.

    Raises:
        OSError: the cache cannot be written; the message names the folder.
    """
    if not remember("trials", {}, None):
        raise OSError(f"{cache_folder()} cannot be written")


def _file(kind: str, key: Mapping[str, Any]) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
