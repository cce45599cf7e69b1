"""Lay out the safetensors files of a result, then write their tensors in pieces.

Each file holds 8 bytes with the header's length, the header in JSON, and the tensors. The layout
follows from dtypes and shapes alone, so every tensor's offset is known in advance, and tensors can
be written in any order, several at a time.

Source: the format's description, https://github.com/huggingface/safetensors#format; ``pwrite(2)``
and ``fsync(2)``.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.safetensors_header import BITS
from int4_lora.integration.conversion.tasks import Task

__all__ = ["ResultFile", "index_of", "lay_out", "thread_pool", "write_file"]

ALIGNMENT = 8  # of the first tensor; the widest dtypes come first, so that all are aligned
SYNC_SECONDS = 0.25


@dataclass(frozen=True)
class ResultFile:
    """One safetensors file of a result.

    Args:
        name: the file's name.
        tasks: the tasks that make its tensors.
        header: the bytes of the file before the tensors.
        places: the offset of each tensor from the start of the file, in bytes.
        size: the size of the file in bytes.
    """

    name: str
    tasks: tuple[Task, ...]
    header: bytes
    places: Mapping[str, int]
    size: int


def lay_out(tasks: Sequence[Task], most_bytes: int) -> tuple[ResultFile, ...]:
    """Distribute tensors over files.

    Args:
        tasks: the tasks that make the tensors, in the order of the files; the tensors of one task
            go into the same file.
        most_bytes: the most bytes of tensors in a file that holds more than one task.

    Returns:
        The files, with the names that transformers uses.
    """
    groups = list(_groups(tasks, most_bytes))
    if len(groups) == 1:
        return (_lay_out_file("model.safetensors", groups[0]),)
    count = len(groups)
    return tuple(
        _lay_out_file(f"model-{number:05}-of-{count:05}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    )


def index_of(files: Sequence[ResultFile]) -> dict[str, object] | None:
    """Return the JSON index that several files need, or None for a single file."""
    if len(files) == 1:
        return None
    weight_map = {name: file.name for file in files for name in file.places}
    total = sum(task.nbytes for file in files for task in file.tasks)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _groups(tasks: Sequence[Task], most_bytes: int) -> Iterator[list[Task]]:
    """Yield the tasks of each file."""
    group: list[Task] = []
    nbytes = 0
    for task in tasks:
        if group and nbytes + task.nbytes > most_bytes:
            yield group
            group, nbytes = [], 0
        group.append(task)
        nbytes += task.nbytes
    yield group


def _lay_out_file(name: str, tasks: Sequence[Task]) -> ResultFile:
    outputs = [output for task in tasks for output in task.outputs]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for output in sorted(outputs, key=lambda output: (-BITS[output.dtype], output.name)):
        offsets[output.name] = end
        header[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [end, end + output.nbytes],
        }
        end += output.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    places = {name: len(start) + offset for name, offset in offsets.items()}
    return ResultFile(name, tuple(tasks), start, places, len(start) + end)


@contextlib.contextmanager
def thread_pool(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of ``jobs`` threads, and divide torch's thread count by ``jobs`` meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // jobs))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def write_file(
    path: Path, file: ResultFile, pool: ThreadPoolExecutor, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Write one file and flush it to the disk.

    Args:
        path: where to write it; an existing file is overwritten.
        file: the file's layout.
        pool: runs the tasks.
        advance: called with the number of bytes after each piece.

    Returns:
        The tasks' reports, in the order of the tasks; tasks without a report are left out.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
        TypeError, ValueError: a task cannot use its source, or did not write each byte once.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    written, lock = dict.fromkeys(file.places, 0), threading.Lock()
    try:
        os.ftruncate(descriptor, file.size)
        _write_all(descriptor, memoryview(file.header), 0)

        def write(name: str, start: int, piece: Tensor) -> None:
            data = piece.detach().reshape(-1).view(torch.uint8).numpy().data
            _write_all(descriptor, data, file.places[name] + start)
            with lock:
                written[name] += len(data)
            advance(len(data))

        with _flushing(descriptor):
            reports = _run_all(file.tasks, write, pool)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for output in (output for task in file.tasks for output in task.outputs):
        if written[output.name] != output.nbytes:
            raise ValueError(
                f"{path}: {written[output.name]} of {output.nbytes} bytes of {output.name} were "
                "written"
            )
    return [report for report in reports if report is not None]


def _run_all(
    tasks: Sequence[Task], write: Callable[[str, int, Tensor], None], pool: ThreadPoolExecutor
) -> list[dict[str, Any] | None]:
    """Run tasks, the largest first so that it does not run alone at the end; return the reports."""
    largest_first = sorted(tasks, key=lambda task: -task.nbytes)
    futures = {task: pool.submit(task.run, write) for task in largest_first}
    done, waiting = wait(futures.values(), return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()
    wait(waiting)
    for future in futures.values():
        if future in done:  # the others were cancelled, or finished after the first error
            future.result()
    return [futures[task].result() for task in tasks]


@contextlib.contextmanager
def _flushing(descriptor: int) -> Iterator[None]:
    """Flush a file in the background while it is written, so that the final fsync is short."""
    over, failed = threading.Event(), list[OSError]()

    def flush() -> None:
        try:
            while not over.wait(SYNC_SECONDS):
                os.fdatasync(descriptor)
        except OSError as error:  # the system reports an fsync error only once
            failed.append(error)

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if failed:
        raise failed[0]


def _write_all(descriptor: int, data: memoryview, start: int) -> None:
    """Write all of ``data`` at offset ``start``; one ``pwrite`` may write less."""
    while data:
        count = os.pwrite(descriptor, data, start)
        data, start = data[count:], start + count
