"""The folder that a result grows in, which takes its name only when it is whole.

Beside ``DST`` stands ``DST.partial``: ``result/`` becomes ``DST``; ``work/`` holds the plan's
digest, a lock for each file, and what finished files report; ``replaced/`` is what ``--force``
replaces. A file has its name once it is whole and on the disk, so a run that was killed is taken up
at the first file that has none.

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

from int4_lora.integration.conversion.writing import sync_folder, write_whole
from int4_lora.integration.json_files import read_json_object

__all__ = ["ResultFolder"]

PLAN = "plan.json"


class ResultFolder:
    """A result on its way to its place.

    Args:
        target: where the result is to stand.
        digest: tells this plan from any other.
    """

    def __init__(self, target: Path, digest: str) -> None:
        self.target, self.digest = target, digest
        self.partial = target.with_name(f"{target.name}.partial")
        self.result = self.partial / "result"
        self.work = self.partial / "work"
        self.replaced = self.partial / "replaced"

    def check_place(self, sources: Iterable[Path], *, force: bool) -> None:
        """Check that the target may be written.

        Args:
            sources: folders that are read.
            force: whether what stands there may be replaced.

        Raises:
            FileExistsError: something stands there.
            ValueError: the target is a source, in one, or around one.
        """
        place = self.target.resolve()
        for source in sources:
            other = source.resolve()
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise ValueError(f"{self.target} must be apart from {source}, which is read")
        if not os.path.lexists(self.target) or self.is_finished():
            return
        if not force:
            raise FileExistsError(f"{self.target} is there: --force replaces it")
        if not self.target.is_dir() or self.target.is_symlink():
            raise FileExistsError(f"{self.target} is there and no folder, which --force replaces")

    def is_finished(self) -> bool:
        """Return whether an earlier run of this plan got as far as its last step."""
        return self.target.is_dir() and self._planned() == self.digest and not self.result.is_dir()

    def is_gone(self) -> bool:
        """Return whether another run has finished while this one was at it."""
        return self.target.is_dir() and not (self.work / PLAN).is_file()

    def open(self, *, force: bool) -> None:
        """Make the folder, or take up the one of an earlier run.

        Args:
            force: whether one of another plan may be thrown away.

        Raises:
            FileExistsError: one of another plan is there.
            OSError: it cannot be made.
        """
        planned = self._planned()
        if planned is not None and planned != self.digest:
            if not force:
                raise FileExistsError(
                    f"{self.partial} is of a run with another source or other options: "
                    "delete it, or --force"
                )
            shutil.rmtree(self.partial)
        self.result.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        if self._planned() is None:
            write_whole(self.work / PLAN, json.dumps({"digest": self.digest}).encode())

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
        write_whole(self.work / f"{name}.report", json.dumps({"modules": reports}).encode())
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
        """Keep other runs from finishing; yield False where one has."""
        if self.is_gone():
            yield False
            return
        with self.lock("closing"):
            yield not self.is_gone()

    def finish(self, fill: Callable[[Path], None]) -> None:
        """Put the result into its place, and tidy up.

        Args:
            fill: writes the last files into the folder that it is given.
        """
        if not self.is_finished():
            fill(self.result)
            sync_folder(self.result)
            if self.target.is_dir():
                self.target.rename(self.replaced)
            self.result.rename(self.target)
            sync_folder(self.target.parent)
        shutil.rmtree(self.partial)

    def _planned(self) -> str | None:
        """Return the digest of the plan that the folder was made for, or None."""
        file = self.work / PLAN
        if not file.is_file():
            return None
        digest = read_json_object(file).get("digest")
        return digest if isinstance(digest, str) else ""
