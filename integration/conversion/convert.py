"""A conversion from its plan to its result: laid out, written, put in place.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from int4_lora.atomic_files import write_synced
from int4_lora.integration.conversion.other_files import copy_files, other_files
from int4_lora.integration.conversion.result_files import ResultFile, index_of, lay_out
from int4_lora.integration.conversion.result_folder import ResultFolder
from int4_lora.integration.conversion.tasks import Task
from int4_lora.integration.conversion.writing import threads_shared, write_file

__all__ = ["Conversion", "Outcome", "Settings", "convert"]

FORMAT = 1  # counts up when the same plan makes other bytes
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
Accept = Callable[[list[dict[str, Any]]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Conversion:
    """What is to be made of a checkpoint.

    Args:
        source: the checkpoint's folder.
        others: other folders that are read, such as adapters.
        tasks: what makes the result's tensors.
        config: the result's config.json, or None for that of the source.
        accept: takes what the tasks report and returns the result's own report, or None; raises
            to keep the result from its place.
        report: the file of the result that holds the report, or None.
    """

    source: Path
    others: tuple[Path, ...]
    tasks: tuple[Task, ...]
    config: Mapping[str, Any] | None
    accept: Accept = field(default=lambda reports: None)
    report: str | None = None


@dataclass(frozen=True)
class Settings:
    """How a conversion is run; none of it changes a byte but ``most_bytes``.

    Args:
        jobs: tensors that are worked on at a time.
        share: ``(number, of)``: this run makes the number-th of so many shares of the files, and
            leaves the rest and the joining to others; None for everything.
        most_bytes: of tensors in a file.
        force: whether what stands in the result's place is replaced.
        dry_run: whether nothing is written.
        advance: is told of bytes that are written.
        begin: is told how many bytes there are to write.
    """

    jobs: int = 2
    share: tuple[int, int] | None = None
    most_bytes: int = 5 * 10**9
    force: bool = False
    dry_run: bool = False
    advance: Callable[[int], None] = field(default=lambda count: None)
    begin: Callable[[int], None] = field(default=lambda count: None)


@dataclass(frozen=True)
class Outcome:
    """What a run did, or would do.

    Args:
        target: the result's folder.
        files: the bytes of each of its safetensors files.
        carried: the other files that are carried along.
        written: which files this run wrote.
        missing: which files are still to be written, by others.
        finished: whether the result is in its place.
        report: what the conversion reports, or None.
    """

    target: Path
    files: Mapping[str, int]
    carried: Sequence[str]
    written: Sequence[str]
    missing: Sequence[str]
    finished: bool
    report: Mapping[str, Any] | None = None


def convert(conversion: Conversion, target: Path, settings: Settings) -> Outcome:
    """Write the result of a conversion, or what is left of it by earlier runs.

    Args:
        conversion: what to make.
        target: where it is to stand.
        settings: how.

    Returns:
        What was done.

    Raises:
        OSError: the target is there, cannot be written, or the disk is too small or full.
        ValueError: a source that cannot be used; nothing stands in the target's place then.
    """
    files = lay_out(conversion.tasks, settings.most_bytes)
    carried = other_files(conversion.source)
    target = target if target.name else target.resolve()
    folder = ResultFolder(target, _digest(conversion, files, carried))
    folder.check_place((conversion.source, *conversion.others), force=settings.force)
    sizes = {file.name: file.size for file in files}
    own = _own(files, settings.share)
    if folder.is_finished() and not settings.dry_run:  # it was killed while it tidied up
        folder.tidy_up()
        return Outcome(target, sizes, carried, [], [], finished=True)
    _check_space(folder, [file for file in own if not folder.is_whole(file.name)])
    if settings.dry_run:
        planned = {file.name: file.size for file in own}
        return Outcome(target, planned, carried, [], list(planned), finished=False)
    folder.open()
    written = _write(folder, own, settings)
    missing = _missing(folder, files)
    if missing or (settings.share is not None and settings.share[1] > 1):
        return Outcome(target, sizes, carried, written, missing, finished=False)
    with folder.closing() as open_still:
        if not open_still:  # another run was first
            return Outcome(target, sizes, carried, written, [], finished=True)
        report = conversion.accept(folder.reports(sizes))
        folder.finish(
            lambda place: _fill(place, conversion, files, carried, report), force=settings.force
        )
    return Outcome(target, sizes, carried, written, [], finished=True, report=report)


def _digest(conversion: Conversion, files: Sequence[ResultFile], carried: Sequence[str]) -> str:
    """Return what tells a plan from any other that would write other bytes."""
    plan = {
        "format": FORMAT,
        "source": str(conversion.source.resolve()),
        "config": conversion.config,
        "carried": [[name, _changed(conversion.source / name)] for name in (CONFIG, *carried)],
        "files": {file.name: [task.sources for task in file.tasks] for file in files},
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for file in files:
        digest.update(file.header)
    return digest.hexdigest()


def _check_space(folder: ResultFolder, left: Sequence[ResultFile]) -> None:
    """Check that the disk has room for the files that are left to write."""
    place = folder.target.absolute().parent
    while not place.exists():
        place = place.parent
    needed = sum(file.size for file in left)
    free = shutil.disk_usage(place).free + sum(
        512 * path.stat().st_blocks
        for path in (folder.unfinished(file.name) for file in left)
        if path.is_file()
    )
    if needed > free:
        raise OSError(f"{folder.target} needs {needed} bytes, {free} are free on its disk")


def _changed(file: Path) -> list[int]:
    """Return what tells a file from itself after a change."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _own(files: Sequence[ResultFile], share: tuple[int, int] | None) -> list[ResultFile]:
    """Return the files that this run is to write, unless they are there."""
    number, of = share or (1, 1)
    return [file for place, file in enumerate(files) if place % of == number - 1]


def _write(folder: ResultFolder, files: Sequence[ResultFile], settings: Settings) -> list[str]:
    """Write files, but for those that another process is writing; return their names."""
    from filelock import Timeout

    written: list[str] = []
    left = [file for file in files if not folder.is_whole(file.name)]
    settings.begin(sum(task.nbytes for file in left for task in file.tasks))
    with threads_shared(settings.jobs) as pool:
        for file in files:
            if folder.is_gone():
                break
            with contextlib.suppress(Timeout), folder.lock(file.name).acquire(timeout=0):
                if not folder.is_whole(file.name):
                    _write_one(folder, file, pool, settings)
                    written.append(file.name)
    return written


def _write_one(
    folder: ResultFolder, file: ResultFile, pool: ThreadPoolExecutor, settings: Settings
) -> None:
    path = folder.unfinished(file.name)
    try:
        reports = write_file(path, file, pool, settings.advance)
    except (TypeError, ValueError) as error:  # no other run will do better
        if folder.abandon():
            raise
        kept = f"{error}; what was written before is in {folder.home}"
        raise type(error)(kept) from error
    folder.keep(file.name, reports)


def _missing(folder: ResultFolder, files: Sequence[ResultFile]) -> list[str]:
    """Return the files that are not written, of which there are none once a run has finished."""
    left = [file.name for file in files if not folder.is_whole(file.name)]
    return [] if folder.is_gone() or folder.is_finished() else left


def _fill(
    place: Path,
    conversion: Conversion,
    files: Sequence[ResultFile],
    carried: Sequence[str],
    report: Mapping[str, Any] | None,
) -> None:
    """Write what stands beside the tensors; nobody sees it before it is whole."""
    kept = [] if conversion.config is not None else [CONFIG]
    copy_files(conversion.source, [*carried, *kept], place)
    index = index_of(files)
    if index is not None:
        write_synced(place / INDEX, _json(index))
    if report is not None and conversion.report is not None:
        write_synced(place / conversion.report, _json(report))
    if conversion.config is not None:
        write_synced(place / CONFIG, _json(conversion.config))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
