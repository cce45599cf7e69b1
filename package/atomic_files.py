"""Files given new contents, each of them the old one or the new one at any moment.

Source: POSIX ``rename``, which replaces a name at once; ``fsync`` before it, so that a name never
leads to bytes that a loss of power took.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["replace_files"]


def replace_files(contents: Mapping[Path, bytes], *, like: Path) -> None:
    """Give files of one folder new contents, in the order given.

    All are written beside their places and flushed to the disk before the first is renamed. After a
    kill each is whole, old or new, and a hidden ``.NAME.*.tmp`` may be left.

    Args:
        contents: the bytes of each file; one that is there keeps its permissions.
        like: the file whose permissions a new one gets.

    Raises:
        OSError: one cannot be written; then none is changed.

    Source:
        POSIX ``rename`` and ``fsync``.
    """
    beside: dict[Path, Path] = {}
    try:
        for file, data in contents.items():
            mode = (file if file.exists() else like).stat().st_mode
            descriptor, name = tempfile.mkstemp(".tmp", f".{file.name}.", file.parent)
            beside[file] = Path(name)
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(data)
                opened.flush()
                os.fchmod(opened.fileno(), stat.S_IMODE(mode))
                os.fsync(opened.fileno())
        for file, written in beside.items():
            written.replace(file)
    finally:
        for written in beside.values():
            written.unlink(missing_ok=True)
    for folder in {file.parent for file in contents}:
        _flush(folder)


def _flush(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
