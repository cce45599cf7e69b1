"""Run a conversion: lay out the result's files, write them, move the result to its target.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from int4_lora.atomic_files import write_synced
from int4_lora.integration.conversion.accounting import check_written
from int4_lora.integration.conversion.other_files import copy_files, other_files, weight_files
from int4_lora.integration.conversion.result_files import (
    ResultFile,
    index_of,
    lay_out,
    thread_pool,
    write_file,
)
from int4_lora.integration.conversion.result_folder import ResultFolder
from int4_lora.integration.conversion.tasks import Task

__all__ = ["Conversion", "Outcome", "Settings", "convert"]

FORMAT = 1  # increase it when the same plan writes different bytes
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
Accept = Callable[[list[dict[str, Any]]], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Conversion:
    """The plan of a conversion.

    Args:
        source: the checkpoint's folder.
        others: other folders that are read, such as adapters.
        tasks: the tasks that make the result's tensors.
        config: the result's config.json, or None to copy the source's.
        accept: takes the tasks' reports and returns the result's report, or None; raises an
            exception to refuse the result.
        report: the name of the file for the result's report, or None.
        notes: what was done to make its inputs fit each other, one sentence each.
        dropped: the source's tensors that the result has no place for, and why.
        reads: the names of the source's files of weights that the tasks read.
    """

    source: Path
    others: tuple[Path, ...]
    tasks: tuple[Task, ...]
    config: Mapping[str, Any] | None
    accept: Accept = field(default=lambda reports: None)
    report: str | None = None
    notes: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    reads: Collection[str] = ()


@dataclass(frozen=True)
class Settings:
    """How to run a conversion; only ``most_bytes`` changes the bytes that are written.

    Args:
        jobs: the number of tensors to work on in parallel.
        share: ``(number, of)``: with ``of`` > 1, this run writes only the number-th of ``of``
            shares of the files, and a run without shares moves the result to its target; None
            writes all files.
        most_bytes: the most bytes of tensors in a file.
        force: whether to replace an existing target.
        dry_run: whether to write nothing.
        advance: called with the number of bytes after each piece is written.
        begin: called with the number of bytes to write.
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
        files: the size in bytes of each of the result's safetensors files.
        carried: the other files that are copied from the source.
        written: the files that this run wrote.
        missing: the files that other runs have yet to write.
        finished: whether the result is at its target.
        report: the conversion's report, or None.
        notes: the conversion's notes.
        dropped: the source's tensors that the result has no place for, and why.
        left: the files of weights in the source that are neither converted nor copied.
    """

    target: Path
    files: Mapping[str, int]
    carried: Sequence[str]
    written: Sequence[str]
    missing: Sequence[str]
    finished: bool
    report: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)
    left: Sequence[str] = ()


def convert(conversion: Conversion, target: Path, settings: Settings) -> Outcome:
    """Write the result of a conversion, except the files that earlier runs wrote.

    Args:
        conversion: the plan.
        target: the folder to write.
        settings: how to run the conversion.

    Returns:
        What was written.

    Raises:
        OSError: the target exists or cannot be written, or the disk is too small or full.
        TypeError, ValueError: the source cannot be used, or the result is refused or not as
            planned; the target is not written.
    """
    files = lay_out(conversion.tasks, settings.most_bytes)
    carried = other_files(conversion.source, conversion.others)
    target = target if target.name else target.resolve()
    folder = ResultFolder(target, _digest(conversion, files, carried))
    folder.check_place((conversion.source, *conversion.others), force=settings.force)

    sizes = {file.name: file.size for file in files}
    outcome = Outcome(
        target,
        sizes,
        carried,
        written=[],
        missing=[],
        finished=True,
        notes=conversion.notes,
        dropped=conversion.dropped,
        left=_left(conversion, carried),
    )
    share = _share_of(files, settings.share)
    if folder.is_in_place() and not settings.dry_run:
        folder.tidy_up()
        return outcome
    _check_space(folder, share)
    if settings.dry_run:
        share_sizes = {file.name: file.size for file in share}
        return replace(outcome, files=share_sizes, missing=list(share_sizes), finished=False)

    folder.open()
    outcome = replace(outcome, written=_write(folder, share, settings))
    missing = _missing(folder, files)
    if missing or (settings.share is not None and settings.share[1] > 1):
        return replace(outcome, missing=missing, finished=False)
    with folder.finishing() as unfinished:
        if not unfinished:  # another run has finished this plan
            return outcome
        report = conversion.accept(folder.reports(sizes))
        folder.finish(
            lambda place: _write_other_files(place, conversion, files, carried, report),
            force=settings.force,
        )
    return replace(outcome, report=report)


def _digest(conversion: Conversion, files: Sequence[ResultFile], carried: Sequence[str]) -> str:
    """Return a digest that differs between plans that write different bytes."""
    plan = {
        "format": FORMAT,
        "source": str(conversion.source.resolve()),
        "config": conversion.config,
        "carried": [[name, _identity(conversion.source / name)] for name in (CONFIG, *carried)],
        "files": {file.name: [task.sources for task in file.tasks] for file in files},
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for file in files:
        digest.update(file.header)
    return digest.hexdigest()


def _identity(file: Path) -> list[int]:
    """Return the size and modification time of a file, which show a later write."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _left(conversion: Conversion, carried: Sequence[str]) -> list[str]:
    """Return the files of weights that are neither read nor copied; indexes are no such files."""
    read = {*conversion.reads, *carried}
    return [name for name in weight_files(conversion.source, conversion.others) if name not in read]


def _share_of(files: Sequence[ResultFile], share: tuple[int, int] | None) -> list[ResultFile]:
    """Return the files of this run's share."""
    number, of = share or (1, 1)
    return [file for position, file in enumerate(files) if position % of == number - 1]


def _check_space(folder: ResultFolder, files: Sequence[ResultFile]) -> None:
    """Check that the disk has room for the files that are not yet written."""
    unwritten = [file for file in files if not folder.is_whole(file.name)]
    place = folder.target.absolute().parent
    while not place.exists():
        place = place.parent
    needed = sum(file.size for file in unwritten)
    free = shutil.disk_usage(place).free + sum(
        512 * path.stat().st_blocks
        for path in (folder.unfinished(file.name) for file in unwritten)
        if path.is_file()
    )
    if needed > free:
        raise OSError(f"{folder.target} needs {needed} bytes, {free} are free on its disk")


def _write(folder: ResultFolder, files: Sequence[ResultFile], settings: Settings) -> list[str]:
    """Write the files that no other process is writing; return their names."""
    from filelock import Timeout

    written: list[str] = []
    unwritten = [file for file in files if not folder.is_whole(file.name)]
    settings.begin(sum(task.nbytes for file in unwritten for task in file.tasks))
    with thread_pool(settings.jobs) as pool:
        for file in files:
            if folder.is_gone():
                break
            with contextlib.suppress(Timeout), folder.lock(file.name).acquire(timeout=0):
                if not folder.is_whole(file.name):
                    _write_result_file(folder, file, pool, settings)
                    written.append(file.name)
    return written


def _write_result_file(
    folder: ResultFolder, file: ResultFile, pool: ThreadPoolExecutor, settings: Settings
) -> None:
    try:
        reports = write_file(folder.unfinished(file.name), file, pool, settings.advance)
    except (TypeError, ValueError) as error:  # another run would fail in the same way
        if folder.discard_if_empty():
            raise
        raise type(error)(f"{error}; what was written before is in {folder.home}") from error
    folder.complete(file.name, reports)


def _missing(folder: ResultFolder, files: Sequence[ResultFile]) -> list[str]:
    """Return the files that are not yet written; an empty list once a run has finished."""
    unwritten = [file.name for file in files if not folder.is_whole(file.name)]
    return [] if folder.is_gone() or folder.is_in_place() else unwritten


def _write_other_files(
    place: Path,
    conversion: Conversion,
    files: Sequence[ResultFile],
    carried: Sequence[str],
    report: Mapping[str, Any] | None,
) -> None:
    """Write all files but the tensors', before the result is renamed to its target."""
    copy_files(conversion.source, carried, place)
    index = index_of(files)
    if index is not None:
        write_synced(place / INDEX, _json(index))
    if report is not None and conversion.report is not None:
        write_synced(place / conversion.report, _json(report))
    if conversion.config is not None:
        write_synced(place / CONFIG, _json(conversion.config))
    else:
        copy_files(conversion.source, [CONFIG], place)
    try:
        check_written(place, files, carried)
    except (OSError, ValueError) as error:
        hint = f"remove {place.parent} and run the command again"
        raise ValueError(f"{error}: nothing was put in place; {hint}") from error


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
