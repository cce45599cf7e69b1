"""What was found out once and is kept on disk: one small JSON file for each key.

A file is written beside its place and renamed, so that a reader sees all of it or none, and no two
keys share one, so that writers need no lock. A file that is missing, spoilt or of another key is a
miss; a folder that cannot be written costs the time of finding out again, never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "check_writable", "recall", "remember"]


def cache_folder() -> Path:
    """Return ``$INT4_LORA_CACHE``, ``$XDG_CACHE_HOME/int4-lora`` or ``~/.cache/int4-lora``."""
    chosen = os.environ.get("INT4_LORA_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "int4-lora"


def recall(kind: str, key: Mapping[str, Any]) -> Any:
    """Return the value last remembered under a key, or None.

    Args:
        kind: the folder of values of this sort.
        key: what the value depends on, as JSON would have it.
    """
    try:
        kept = json.loads(_file(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return None  # RuntimeError: there is no home directory
    same = isinstance(kept, dict) and kept.get("key") == json.loads(_text(key))
    return kept.get("value") if same else None


def remember(kind: str, key: Mapping[str, Any], value: Any) -> bool:
    """Keep a value under a key.

    Args:
        kind: the folder of values of this sort.
        key: what the value depends on, as JSON would have it.
        value: the value, as JSON would have it.

    Returns:
        Whether it could be written.
    """
    beside = None
    try:
        file = _file(kind, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=".", suffix=".json", dir=file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump({"key": key, "value": value}, opened, indent=1)
        os.replace(beside, file)
    except (OSError, RuntimeError):
        if beside is not None:
            with contextlib.suppress(OSError):
                os.unlink(beside)
        return False
    return True


def check_writable() -> None:
    """Check that something can be remembered.

    Raises:
        OSError: it cannot; the message names the folder.
    """
    if not remember("trials", {}, None):
        raise OSError(f"{cache_folder()} cannot be written")


def _file(kind: str, key: Mapping[str, Any]) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:32]}.json"


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
