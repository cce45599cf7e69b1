"""Files of a result written tensor by tensor, several at a time.

Source: ``pwrite(2)`` and ``fsync(2)``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.conversion.result_files import ResultFile
from int4_lora.integration.conversion.tasks import Task

__all__ = ["threads_shared", "write_file"]

SYNC_SECONDS = 0.25
Reports = list[dict[str, Any]]


def write_file(
    path: Path, file: ResultFile, pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> Reports:
    """Write one file and force it to the disk.

    Args:
        path: where; what stands there is written over.
        file: what to write.
        pool: runs the tasks.
        advance: is told of bytes that were written.

    Returns:
        What the tasks report, in their order.

    Raises:
        OSError: a full disk, among others.
        ValueError: a source that cannot be used.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(descriptor, file.size)
        _write_all(descriptor, memoryview(file.header), 0)

        def write(name: str, start: int, piece: Tensor) -> None:
            data = piece.detach().reshape(-1).view(torch.uint8).numpy().data
            _write_all(descriptor, data, file.places[name] + start)
            advance(len(data))

        with _syncing(descriptor):
            futures = [pool.submit(task.run, write) for task in _largest_first(file)]
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            wait(waiting)
        for future in futures:
            if future in done and future.exception() is not None:
                raise future.exception() or AssertionError("it has one")
        os.fsync(descriptor)
        reports = dict(zip(map(id, _largest_first(file)), futures, strict=True))
        found = (reports[id(task)].result() for task in file.tasks)
        return [one for one in found if one is not None]
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _syncing(descriptor: int) -> Iterator[None]:
    """Force a file to the disk as it is written, so that little is left for the end."""
    over, failed = threading.Event(), list[OSError]()

    def sync() -> None:
        try:
            while not over.wait(SYNC_SECONDS):
                os.fdatasync(descriptor)
        except OSError as error:  # the system says it once
            failed.append(error)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def _largest_first(file: ResultFile) -> list[Task]:
    """Return the tasks in the order that they are begun in, so that none is left to the end."""
    return sorted(file.tasks, key=lambda task: -task.nbytes)


def _write_all(descriptor: int, data: memoryview, start: int) -> None:
    """Write all of some bytes at a place."""
    while data:
        count = os.pwrite(descriptor, data, start)
        data, start = data[count:], start + count


@contextlib.contextmanager
def threads_shared(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads that share torch's own threads between them."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
