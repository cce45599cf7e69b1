"""Read JSON files that hold one object, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_json_object"]

MOST_BYTES = 32 * 2**20
MOST_LEVELS = 100  # Python copies and writes nested values by calls, whose depth is limited


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Args:
        file: the file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not UTF-8, not JSON, not an object, larger than 32 MiB, or nested
            in more than 100 levels.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{file}: {size} bytes are more than the {MOST_BYTES} that are read")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: the top level must be an object, got {type(value).__name__}")
    if _levels(value) > MOST_LEVELS:
        raise ValueError(f"{file}: its values are nested in more than {MOST_LEVELS} levels")
    return value


def _levels(value: dict[str, Any]) -> int:
    """Return how deep objects and lists are nested in a value."""
    levels, inside = 0, list[Any]([value])
    while inside:
        levels += 1
        inside = [
            member
            for outer in inside
            for member in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(member, (dict, list))
        ]
    return levels
