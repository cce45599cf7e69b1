"""Write files and folders under a temporary name, flush them to the disk, then rename them.

The ``fsync`` before the ``rename`` ensures that after a power loss no name refers to incomplete
bytes.

Source: POSIX ``rename``, which replaces a name atomically, and ``fsync``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["new_folder", "replace_files", "sync_file", "sync_folder", "sync_tree", "write_synced"]


def replace_files(contents: Mapping[Path, bytes], *, like: Path | None = None) -> None:
    """Replace the contents of files, in the order given.

    All temporary files are written beside their targets and flushed before the first is renamed.
    After a kill each file is complete, old or new, and a hidden ``.NAME.*.tmp`` may remain.

    Args:
        contents: the bytes of each file; an existing file keeps its permissions.
        like: the file whose permissions a new file gets; None means the umask's permissions.

    Raises:
        OSError: a file cannot be written; then none is changed.
    """
    written: dict[Path, Path] = {}
    try:
        for file, data in contents.items():
            model = file if file.exists() else like
            beside = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
            with beside.open("xb") as opened:
                written[file] = beside
                opened.write(data)
                opened.flush()
                if model is not None:
                    os.fchmod(opened.fileno(), stat.S_IMODE(model.stat().st_mode))
                os.fsync(opened.fileno())
        for file, beside in written.items():
            beside.replace(file)
    finally:
        for beside in written.values():
            beside.unlink(missing_ok=True)
    for folder in {file.parent for file in contents}:
        sync_folder(folder)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, and rename it to ``folder`` after the body.

    The yielded folder is inside a hidden folder beside ``folder``, and is removed if the body
    raises.

    Args:
        folder: the folder to make; missing parents are made too.

    Raises:
        OSError: the folder cannot be made, or after the body ``folder`` exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        yield made
        sync_tree(made)
        made.rename(folder)
    sync_folder(folder.parent)


def write_synced(file: Path, data: bytes) -> None:
    """Write a file under its final name and flush it to the disk.

    Use it for files in a folder that is renamed later.
    """
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def sync_file(file: Path) -> None:
    """Flush the contents of a file to the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, on filesystems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and all that is in it to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
        else:
            sync_folder(path)
    sync_folder(folder)
