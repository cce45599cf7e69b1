"""Write files and folders beside their place, flush them to the disk, then rename them.

Source: POSIX ``rename``, which replaces a name at once; ``fsync`` before it, so that after a power
loss a name never leads to incomplete bytes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["new_folder", "replace_files", "sync_file", "sync_folder", "write_synced"]


def replace_files(contents: Mapping[Path, bytes], *, like: Path | None = None) -> None:
    """Give files new contents, in the order given.

    All are written beside their places and flushed before the first is renamed. After a kill each
    file is whole, old or new, and a hidden ``.NAME.*.tmp`` may be left.

    Args:
        contents: the bytes of each file; a file that exists keeps its permissions.
        like: the file whose permissions a new file gets; None means those of the umask.

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
    """Yield an empty folder that takes the place of ``folder`` once the body is done.

    It stands in a hidden folder beside its place. If the body raises, it is removed.

    Args:
        folder: the folder to make; its parents are made if they are missing.

    Raises:
        OSError: it cannot be made, or ``folder`` exists by the end and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        yield made
        for path in made.rglob("*"):
            if path.is_file():
                sync_file(path)
            else:
                sync_folder(path)
        sync_folder(made)
        made.rename(folder)
    sync_folder(folder.parent)


def write_synced(file: Path, data: bytes) -> None:
    """Write a file in its place and flush it to the disk.

    This is for files of a folder that itself gets its name later.
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
