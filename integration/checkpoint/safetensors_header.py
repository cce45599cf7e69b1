"""Read and check the header of a safetensors file: names, dtypes, shapes and offsets of tensors.

A file holds 8 bytes with the header's length, the header in JSON, and the tensors one after the
other without a gap. This reader replaces the safetensors library, which maps the whole file to read
a header, so that it fails for a file larger than memory and swap, and does not return the offsets
of tensors.

Source: the format's description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

__all__ = ["StoredTensor", "identity_of", "read_headers"]

MOST_HEADER_BYTES = 32 * 2**20  # some 200,000 tensors; the format allows 100 MB
METADATA = "__metadata__"
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
Identity: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    Args:
        file: the safetensors file.
        dtype: the safetensors name of the dtype, for example "BF16" or "I32".
        shape: the tensor's shape.
        start: the offset of the tensor from the start of the file, in bytes.
        nbytes: the size of the tensor in bytes.
        identity: device, inode, size and time of change of the file when it was opened.
    """

    file: Path
    dtype: str
    shape: Sequence[int]
    start: int
    nbytes: int
    identity: Identity


def read_headers(file: Path) -> dict[str, StoredTensor]:
    """Return every tensor of one file by name, reading the header only.

    Args:
        file: a safetensors file.

    Raises:
        ValueError: the file is not a readable safetensors file; the message names the rule.
    """
    with file.open("rb") as opened:
        identity = identity_of(opened.fileno())
        length = int.from_bytes(opened.read(8), "little")
        if length > MOST_HEADER_BYTES:
            rule = f"at most {MOST_HEADER_BYTES} bytes are read of a header"
            raise _unreadable(file, f"{rule}, got a length of {length}")
        text = opened.read(length)
    size = identity[2]
    if size < 8 + length or len(text) < length:
        raise _unreadable(file, f"{size} bytes are fewer than its header of {length} and 8")
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _unreadable(file, "its header is no object")
    header.pop(METADATA, None)
    tensors = {
        name: _as_stored(file, name, entry, 8 + length, identity) for name, entry in header.items()
    }
    _check_places(file, tensors, 8 + length, size)
    return tensors


def identity_of(descriptor: int) -> Identity:
    """Return the device, inode, size and time of change of an open file."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _as_stored(file: Path, name: str, entry: object, data: int, identity: Identity) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _unreadable(file, f"{name} must be an object, got {entry!r}")
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _unreadable(file, f"{name} must have a dtype of the format, got {dtype!r}")
    if not _are_lengths(shape):
        raise _unreadable(file, f"{name} must have a shape of lengths, got {shape!r}")
    if not _are_lengths(place) or len(place) != 2:
        raise _unreadable(file, f"{name} must have two data_offsets, got {place!r}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (place[1] - place[0]):
        where = f"data_offsets of {bits / 8:g} bytes"
        raise _unreadable(file, f"{name}, {dtype} {shape}, must have {where}, got {place}")
    return StoredTensor(file, dtype, tuple(shape), data + place[0], bits // 8, identity)


def _check_places(file: Path, tensors: dict[str, StoredTensor], data: int, size: int) -> None:
    """Check that the tensors follow each other and fill the file."""
    end = data
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start != end:
            rule = "tensors must follow each other without gap or overlap"
            raise _unreadable(file, f"{rule}: {name} begins at byte {stored.start}, not {end}")
        end += stored.nbytes
    if end != size:
        raise _unreadable(file, f"its tensors end at byte {end}, the file at {size}")


def _are_lengths(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(length) is int and 0 <= length < 2**63 for length in value
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a key stands twice")
    return members


def _unreadable(file: Path, why: str) -> ValueError:
    shown = why if len(why) <= 300 else f"{why[:300]}..."
    return ValueError(f"{file}: not a readable safetensors file: {shown}")
