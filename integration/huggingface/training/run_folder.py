"""The folder in which a run keeps its checkpoints, until the adapter is whole.

``OUTPUT.partial``, beside ``OUTPUT``, holds ``run.json``, which describes the run; ``checkpoint-N``
for the last step N that was saved; and ``lock``. Trainer writes a checkpoint in ``writing/``. It is
moved from there once it is whole and on the disk, so a killed run leaves its last whole checkpoint.

Source: ``rename(2)``, which replaces a name atomically.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from int4_lora.atomic_files import replace_files, sync_folder, sync_tree
from int4_lora.integration.checkpoint.json_files import read_json_object

__all__ = ["RunFolder"]

RUN_FILE = "run.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """The place of a run's adapter, and of its checkpoints until then.

    Args:
        output: the folder that the adapter gets.

    Raises:
        ValueError: the output is the root of the filesystem.
    """

    def __init__(self, output: Path) -> None:
        self.output = output = output.resolve() if output.name in ("", "..") else output
        if not output.name:
            raise ValueError(f"the output must be a folder that can be made, got {output}")
        self.partial = output.with_name(f"{output.name}.partial")
        self.writing = self.partial / "writing"

    def check_place(self, sources: Iterable[Path], *, resume: bool, force: bool) -> None:
        """Check that the run may write here; nothing is changed.

        Args:
            sources: the files and folders that are read.
            resume: whether an unfinished run is continued.
            force: whether an adapter or an unfinished run may be replaced.

        Raises:
            FileExistsError: an adapter or an unfinished run is there.
            FileNotFoundError: there is no unfinished run to resume.
            ValueError: a source is in the output, or the output in a source.
        """
        for source in sources:
            read = source.resolve()
            for place in (self.output.resolve(), self.partial.resolve()):
                if place.is_relative_to(read) or read.is_relative_to(place):
                    raise ValueError(f"{place} must be apart from {source}, which is read")
        for place in (self.output, self.partial):
            if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
                raise FileExistsError(f"{place} is there and is no folder")
        unfinished = (self.partial / RUN_FILE).is_file()
        if resume and not unfinished:
            raise FileNotFoundError(f"{self.partial} holds no unfinished run to resume")
        if os.path.lexists(self.output) and not force:
            raise FileExistsError(f"{self.output} is there: --force replaces it")
        if os.path.lexists(self.partial) and not (resume or force):
            raise FileExistsError(
                f"{self.partial} holds an unfinished run: --resume continues it, --force begins "
                "again"
            )

    def check_same(self, description: Mapping[str, Any]) -> None:
        """Check that an unfinished run was told the same.

        Args:
            description: what this run is told.

        Raises:
            ValueError: a value differs; the message names it, and both values.
        """
        file = self.partial / RUN_FILE
        before = read_json_object(file)
        for name in dict.fromkeys((*before, *description)):
            old, new = before.get(name), description.get(name)
            if old != new:
                raise ValueError(
                    f"{file}: {name} differs: the unfinished run has {_shown(old)}, this command "
                    f"{_shown(new)}"
                )

    @contextlib.contextmanager
    def opened(self, description: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Make or open the folder while no other run writes there.

        If the body raises, what Trainer was writing is removed, and before the first checkpoint the
        whole folder.

        Args:
            description: what the run is told, as JSON types.
            resume: whether an unfinished run is continued; otherwise its files are removed.

        Raises:
            OSError: the folder cannot be written, or another run writes there.
        """
        from filelock import FileLock, Timeout

        self.partial.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.partial / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FileExistsError(f"{self.partial}: another run writes there") from None
        try:
            for path in sorted(self.partial.iterdir(), key=lambda path: path.name != RUN_FILE):
                if path.name != "lock" and (path == self.writing or not resume):
                    _remove(path)
            if not resume:
                text = json.dumps(description, indent=2) + "\n"
                with self.naming_failures():
                    replace_files({self.partial / RUN_FILE: text.encode()})
            yield
        except BaseException:
            shutil.rmtree(self.writing, ignore_errors=True)
            if self.last_checkpoint() is None:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise
        finally:
            lock.release()

    def last_checkpoint(self) -> Path | None:
        """Return the checkpoint of the last step that was saved, or None."""
        steps = {}
        for path in self.partial.glob("checkpoint-*"):
            match = CHECKPOINT.fullmatch(path.name)
            if match is not None:
                steps[int(match[1])] = path
        return steps[max(steps)] if steps else None

    def keep(self, step: int) -> None:
        """Keep the checkpoint that Trainer has written, and remove the checkpoint before it.

        At each moment a whole checkpoint has its name. A checkpoint of the same step is the state
        of the same run, so the kept checkpoint stays.

        Args:
            step: the step of the checkpoint.
        """
        written, before = self.writing / f"checkpoint-{step}", self.last_checkpoint()
        kept = self.partial / written.name
        if before == kept:
            _remove(written)
            return
        sync_tree(written)
        written.rename(kept)
        sync_folder(self.partial)
        if before is not None:
            _remove(before)

    @contextlib.contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Raise an OSError that names the folder if the body, which writes there, fails.

        On a full disk safetensors raises a SafetensorError, torch a RuntimeError, and ``fsync`` an
        OSError without a file.

        Raises:
            OSError: the body cannot write.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            last, reason = self.last_checkpoint(), str(error).partition("\n")[0]
            kept = "no checkpoint was saved" if last is None else f"--resume continues {last.name}"
            raise OSError(f"{self.partial} cannot be written: {reason}; {kept}") from error

    def place(self, adapter: Path) -> None:
        """Give the adapter its name, and remove the checkpoints.

        Args:
            adapter: the folder with the whole adapter, inside ``partial``.
        """
        sync_tree(adapter)
        replaced = self.partial / "replaced"
        if os.path.lexists(self.output):
            self.output.rename(replaced)
        adapter.rename(self.output)
        sync_folder(self.output.parent)
        shutil.rmtree(self.partial)


def _remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _shown(value: object) -> str:
    """Return a value of a description as a message shows it."""
    return "none" if value is None else json.dumps(value)
