"""The folder that a result grows in, which takes its name only when it is whole.

Beside ``DST`` stands ``DST.partial`` with a folder for each plan, so that no two plans meet:
``result/`` becomes ``DST``; ``work/`` holds the plan, a lock for each file, and what finished files
report; ``replaced/`` is what ``--force`` replaces. A file has its name once it is whole and on the
disk, so a run that was killed is taken up at the first file that has none.

Source: ``rename(2)``, which replaces a name at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from int4_lora.atomic_files import sync_folder, write_synced
from int4_lora.integration.checkpoint.json_files import read_json_object

__all__ = ["ResultFolder"]

PLAN = "plan.json"
LETTERS = 16  # of a plan's digest


class ResultFolder:
    """A result on its way to its place.

    Args:
        target: where the result is to stand.
        digest: tells this plan from any other.
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
            sources: folders that are read.
            force: whether what stands there may be replaced.

        Raises:
            FileExistsError: something stands there.
            ValueError: the target, or where it grows, is a source, in one, or around one.
        """
        for source in sources:
            other = source.resolve()
            for place in (self.target.resolve(), self.partial.resolve()):
                if place.is_relative_to(other) or other.is_relative_to(place):
                    raise ValueError(f"{place} must be apart from {source}, which is read")
        if os.path.lexists(self.partial) and not self._is_folder(self.partial):
            raise FileExistsError(f"{self.partial} is there and is no folder")
        if not self.is_finished():
            self._check_target(force=force)

    def _check_target(self, *, force: bool) -> None:
        if not os.path.lexists(self.target):
            return
        if not self._is_folder(self.target):
            raise FileExistsError(f"{self.target} is there and is no folder")
        if not force:
            raise FileExistsError(f"{self.target} is there: --force replaces it")

    def _is_folder(self, path: Path) -> bool:
        return path.is_dir() and not path.is_symlink()

    def is_finished(self) -> bool:
        """Return whether an earlier run of this plan got as far as its last step."""
        return self.target.is_dir() and (self.work / PLAN).is_file() and not self.result.is_dir()

    def is_gone(self) -> bool:
        """Return whether another run has finished while this one was at it."""
        return self.target.is_dir() and not (self.work / PLAN).is_file()

    def open(self) -> None:
        """Make the folder, or take up the one of an earlier run.

        Raises:
            OSError: it cannot be made.
        """
        self.result.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        if not (self.work / PLAN).is_file():
            write_synced(self.work / PLAN, json.dumps({"digest": self.home.name}).encode())
            sync_folder(self.work)

    def abandon(self) -> bool:
        """Throw away what cannot become a result, unless a file of it is whole; say whether."""
        if any(self.result.iterdir()):
            return False
        self.tidy_up()
        return True

    def is_whole(self, name: str) -> bool:
        """Return whether a file of the result is written."""
        return (self.result / name).is_file()

    def unfinished(self, name: str) -> Path:
        """Return where a file of the result is written."""
        return self.work / f"{name}.unfinished"

    def lock(self, name: str) -> Any:
        """Return the lock of a file of the result, which dies with the process that holds it."""
        from filelock import FileLock

        return FileLock(self.work / f"{name}.lock")

    def keep(self, name: str, reports: list[dict[str, Any]]) -> None:
        """Give a file of the result its name; it must be on the disk."""
        write_synced(self.work / f"{name}.report", json.dumps({"modules": reports}).encode())
        self.unfinished(name).replace(self.result / name)
        sync_folder(self.result)

    def reports(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return what files of the result reported."""
        found: list[dict[str, Any]] = []
        for name in names:
            found += read_json_object(self.work / f"{name}.report")["modules"]
        return found

    @contextlib.contextmanager
    def closing(self) -> Iterator[bool]:
        """Keep other runs of this plan from finishing; yield False where one has."""
        from filelock import FileLock

        lock = FileLock(self.partial / f"{self.home.name}.lock")
        try:
            lock.acquire()
        except OSError:  # its folder went with the run that finished
            if not self.is_gone():
                raise
            yield False
            return
        try:
            yield not self.is_gone()
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it finds that it is gone
            lock.release()
            with contextlib.suppress(OSError):
                self.partial.rmdir()  # unless other plans are at it

    def finish(self, fill: Callable[[Path], None], *, force: bool) -> None:
        """Put the result into its place, and tidy up.

        Args:
            fill: writes the last files into the folder that it is given.
            force: whether what stands in the place is replaced.

        Raises:
            FileExistsError: something stands there by now.
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
        """Remove what is left of the plan, what says that it was finished at the very end."""
        shutil.rmtree(self.replaced, ignore_errors=True)
        shutil.rmtree(self.result, ignore_errors=True)
        for file in self.work.iterdir():
            if file.name != PLAN:
                file.unlink(missing_ok=True)
        shutil.rmtree(self.home)
        with contextlib.suppress(OSError):
            self.partial.rmdir()
