"""The folder that a result grows in; the result gets its name only when it is whole.

``DST.partial`` stands beside ``DST`` and holds a folder for each plan, so that plans do not
interfere. In it, ``result/`` becomes ``DST``; ``work/`` holds the plan, a lock for each file, and
the reports of finished files; ``replaced/`` holds what ``--force`` replaces. A file gets its name
once it is whole and on the disk, so after a kill the next run continues with the first file that
has no name.

Source: ``rename(2)``, which replaces a name at once.
"""

from __future__ import annotations

import contextlib
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
    """A result on its way to its place.

    Args:
        target: the result's place.
        digest: differs between plans.
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
            ValueError: the target or its partial folder is a source, is in one, or contains one.
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
        """Return whether an earlier run of this plan was stopped only while it tidied up."""
        return self.target.is_dir() and (self.work / PLAN).is_file() and not self.result.is_dir()

    def is_gone(self) -> bool:
        """Return whether another run finished this plan and tidied up in the meantime."""
        return self.target.is_dir() and not (self.work / PLAN).is_file()

    def open(self) -> None:
        """Make the folder, or continue with that of an earlier run.

        Raises:
            OSError: the folder cannot be made.
        """
        self.result.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        if not (self.work / PLAN).is_file():
            write_synced(self.work / PLAN, json.dumps({"digest": self.home.name}).encode())
            sync_folder(self.work)

    def discard_if_empty(self) -> bool:
        """Remove the folder unless it holds a whole file; return whether it was removed."""
        if any(self.result.iterdir()):
            return False
        self.tidy_up()
        return True

    def is_whole(self, name: str) -> bool:
        """Return whether a file of the result is whole."""
        return (self.result / name).is_file()

    def unfinished(self, name: str) -> Path:
        """Return the place where a file of the result is written."""
        return self.work / f"{name}.unfinished"

    def lock(self, name: str) -> BaseFileLock:
        """Return the lock of a file of the result; the system frees it when its process dies."""
        from filelock import FileLock

        return FileLock(self.work / f"{name}.lock")

    def complete(self, name: str, reports: list[dict[str, Any]]) -> None:
        """Give a file of the result, which is on the disk, its name.

        Args:
            name: the file's name.
            reports: the reports of the tasks that made its tensors.
        """
        write_synced(self.work / f"{name}.report", json.dumps({"modules": reports}).encode())
        self.unfinished(name).replace(self.result / name)
        sync_folder(self.result)

    def reports(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return the reports that were kept with files of the result."""
        reports: list[dict[str, Any]] = []
        for name in names:
            reports += read_json_object(self.work / f"{name}.report")["modules"]
        return reports

    @contextlib.contextmanager
    def finishing(self) -> Iterator[bool]:
        """Keep other runs of this plan from finishing; yield False if one has finished already."""
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
            Path(lock.lock_file).unlink(missing_ok=True)  # a run that waits for it sees is_gone
            lock.release()
            self._remove_partial()

    def finish(self, fill: Callable[[Path], None], *, force: bool) -> None:
        """Put the result in its place, and tidy up.

        Args:
            fill: writes the last files into the folder that it is given.
            force: whether an existing target may be replaced.

        Raises:
            FileExistsError: the target exists by now.
        """
        fill(self.result)
        sync_folder(self.result)
        self._check_target(force=force)
        if self.target.is_dir():
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.target.rename(self.replaced)
        self.result.rename(self.target)
        sync_folder(self.target.parent)
        self.tidy_up()

    def tidy_up(self) -> None:
        """Remove the folder; the plan, which shows that the result is in place, goes last."""
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
