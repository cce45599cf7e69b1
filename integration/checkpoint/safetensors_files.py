"""Read tensors, or some of their rows or bytes, from the safetensors files of a folder.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.safetensors_header import StoredTensor, identity_of

__all__ = ["DTYPES", "INDEX_FILE", "SINGLE_FILE", "bytes_of", "inside", "read_rows", "read_tensor"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """Read one tensor to the CPU.

    The bytes are read, not mapped, because page faults can cost far more: see
    ``docs/commands/inspect.md``.

    Args:
        stored: the tensor in its file.
        name: the tensor's name, for the messages.

    Raises:
        ValueError: torch has no such dtype, or the file changed since its header was read.
    """
    where = f"{stored.file}: {name}"
    if stored.dtype not in DTYPES:
        raise ValueError(f"{where}: torch cannot hold the dtype {stored.dtype}")
    try:
        with stored.file.open("rb", buffering=0) as opened:
            if identity_of(opened.fileno()) != stored.identity:
                raise ValueError(f"{where}: the file changed since it was opened")
            tensor = torch.empty(tuple(stored.shape), dtype=DTYPES[stored.dtype])
            target = tensor.reshape(-1).view(torch.uint8).numpy().data
            opened.seek(stored.start)
            if not _fill(opened, target):
                raise ValueError(f"{where}: the file changed since it was opened")
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error}") from error
    return tensor


def read_rows(stored: StoredTensor, name: str, start: int, stop: int) -> Tensor:
    """Read the rows ``[start, stop)`` of one tensor to the CPU.

    Args:
        stored: the tensor in its file; its first dimension is the rows.
        name: the tensor's name, for the messages.
        start: the first row.
        stop: the row after the last.

    Raises:
        ValueError: as in ``read_tensor``.
    """
    rows, *others = stored.shape
    each = stored.nbytes // rows if rows else 0
    part = dataclasses.replace(
        stored,
        shape=(stop - start, *others),
        start=stored.start + start * each,
        nbytes=(stop - start) * each,
    )
    return read_tensor(part, name)


def bytes_of(stored: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Return the bytes ``[start, stop)`` of a stored tensor, as a stored uint8 tensor."""
    count = stop - start
    return dataclasses.replace(
        stored, dtype="U8", shape=(count,), start=stored.start + start, nbytes=count
    )


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``, after checking that no link leads out of the folder.

    Links within the Hugging Face hub's cache are allowed: its snapshots link to files beside them.

    Raises:
        ValueError: a link leads out of the folder.
    """
    file = folder / name
    try:
        home, place = folder.resolve(), file.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError up to Python 3.12
        raise ValueError(f"{file} is a link that leads nowhere: {error}") from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(place.is_relative_to(root) for root in allowed):
        raise ValueError(f"{file} is a link that leaves the folder")
    return file


def _fill(opened: io.RawIOBase, target: memoryview) -> bool:
    """Read until ``target`` is full; return whether the file had enough bytes."""
    done = 0
    while done < len(target):
        count = opened.readinto(target[done:])  # Linux reads at most 2 GiB at once
        if not count:
            return False
        done += count
    return True
