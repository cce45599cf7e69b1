"""The folder in which a result is written; it is renamed to the target once it is complete.

``DST.partial``, beside ``DST``, holds one folder per plan, so that plans do not interfere. In such
a folder, ``result/`` becomes ``DST``; ``work/`` holds the plan, a lock for each file and the
reports of finished files; ``replaced/`` holds the old ``DST`` that ``--force`` replaces. A file is
renamed into ``result/`` once it is complete and flushed to the disk, so after a kill the next run
continues with the first file that is not in ``result/``.

Source: ``rename(2)``, which replaces a name atomically.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from int4_lora.atomic_files import sync_folder, write_synced
from int4_lora.integration.checkpoint.json_files import read_json_object

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["ResultFolder"]

PLAN = "plan.json"
LETTERS = 16  # of a plan's digest


class ResultFolder:
    """A result that is being written.

    Args:
        target: the folder that the result becomes.
        digest: the plan's digest; it differs between plans.
    """

    def __init__(self, target: Path, digest: str) -> None:
        self.target = target
        self.partial = target.with_name(f"{target.name}.partial")
        self.home = self.partial / digest[:LETTERS]
        self.result, self.work = self.home / "result", self.home / "work"
        self.replaced = self.home / "replaced"

    def check_place(self, sources: Iterable[Path], *, force: bool) -> None:
        """Check that the target may be written.

        Args:
            sources: the folders that are read.
            force: whether an existing target may be replaced.

        Raises:
            FileExistsError: the target exists.
            ValueError: the target or its partial folder is a source, lies in a source, or contains
                a source.
        """
        for source in sources:
            read = source.resolve()
            for place in (self.target.resolve(), self.partial.resolve()):
                if place.is_relative_to(read) or read.is_relative_to(place):
                    raise ValueError(f"{place} must be apart from {source}, which is read")
        if os.path.lexists(self.partial) and not _is_folder(self.partial):
            raise FileExistsError(f"{self.partial} is there and is no folder")
        if not self.is_in_place():
            self._check_target(force=force)

    def _check_target(self, *, force: bool) -> None:
        if not os.path.lexists(self.target):
            return
        if not _is_folder(self.target):
            raise FileExistsError(f"{self.target} is there and is no folder")
        if not force:
            raise FileExistsError(f"{self.target} is there: --force replaces it")

    def is_in_place(self) -> bool:
        """Return whether an earlier run moved the result to the target but did not tidy up."""
        return self.target.is_dir() and (self.work / PLAN).is_file() and not self.result.is_dir()

    def is_gone(self) -> bool:
        """Return whether another run has finished this plan and tidied up."""
        return self.target.is_dir() and not (self.work / PLAN).is_file()

    def open(self) -> None:
        """Make the folder, or continue with the folder of an earlier run.

        Raises:
            OSError: the folder cannot be made.
        """
        with contextlib.suppress(FileNotFoundError):  # another plan's run removed the empty partial
            self.result.mkdir(parents=True, exist_ok=True)
        self.result.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        if not (self.work / PLAN).is_file():
            write_synced(self.work / PLAN, json.dumps({"digest": self.home.name}).encode())
            sync_folder(self.work)

    def discard_if_empty(self) -> bool:
        """Remove the folder unless it holds a complete file; return whether it was removed."""
        if any(self.result.iterdir()):
            return False
        self.tidy_up()
        return True

    def is_whole(self, name: str) -> bool:
        """Return whether a file of the result is complete."""
        return (self.result / name).is_file()

    def unfinished(self, name: str) -> Path:
        """Return the path at which a file of the result is written until it is complete."""
        return self.work / f"{name}.unfinished"

    def lock(self, name: str) -> BaseFileLock:
        """Return the lock of a file of the result; the system releases it if its holder dies."""
        from filelock import FileLock

        return FileLock(self.work / f"{name}.lock")

    def complete(self, name: str, reports: list[dict[str, Any]]) -> None:
        """Rename a file of the result, already flushed to the disk, into ``result/``.

        Args:
            name: the file's name.
            reports: the reports of the tasks that made its tensors.
        """
        write_synced(self.work / f"{name}.report", json.dumps({"modules": reports}).encode())
        self.unfinished(name).replace(self.result / name)
        sync_folder(self.result)

    def reports(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return the reports of the tasks that made the result's files."""
        reports: list[dict[str, Any]] = []
        for name in names:
            reports += read_json_object(self.work / f"{name}.report")["modules"]
        return reports

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """Lock out other runs of this plan; yield False if another run has already finished it."""
        from filelock import FileLock

        lock = FileLock(self.partial / f"{self.home.name}.lock")
        try:
            lock.acquire()
        except OSError:  # the run that finished removed the lock's folder
            if not self.is_gone():
                raise
            yield False
            return
        try:
            yield not self.is_gone()
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # a waiting run then checks is_gone
            lock.release()
            self._remove_partial()

    def finish(self, fill: Callable[[Path], None], *, force: bool) -> None:
        """Move the result to the target, and tidy up.

        Args:
            fill: writes the last files into the folder passed to it.
            force: whether an existing target may be replaced.

        Raises:
            FileExistsError: the target was made in the meantime; the message says where the result
                is kept.
        """
        fill(self.result)
        sync_folder(self.result)
        try:
            self._put_in_place(force=force)
        except FileExistsError as error:
            raise FileExistsError(f"{error}; the whole result is kept in {self.result}") from error
        sync_folder(self.target.parent)
        self.tidy_up()

    def _put_in_place(self, *, force: bool) -> None:
        self._check_target(force=force)
        if self.target.is_dir():
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.target.rename(self.replaced)
        try:
            self.result.rename(self.target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            there = f"{self.target} was made in the meantime: --force replaces it"
            raise FileExistsError(there) from error

    def tidy_up(self) -> None:
        """Remove the folder, and the plan last: it shows that the result is at the target."""
        shutil.rmtree(self.replaced, ignore_errors=True)
        shutil.rmtree(self.result, ignore_errors=True)
        for file in self.work.iterdir():
            if file.name != PLAN:
                file.unlink(missing_ok=True)
        shutil.rmtree(self.home)
        self._remove_partial()

    def _remove_partial(self) -> None:
        with contextlib.suppress(OSError):  # it holds other plans
            self.partial.rmdir()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
