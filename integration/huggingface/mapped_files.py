"""Tell which tensors are parts of files that are mapped into memory and were not written to.

safetensors maps a file and makes each tensor a view of it. A page that nobody reads takes no
memory; a page that was read stays in memory for as long as a view of the file lives. So tensors
that are known to be the file's are better read from the file than from their pages.

Source: ``/proc/pid/smaps`` in ``proc(5)``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from int4_lora.integration.checkpoint.safetensors_header import StoredTensor

__all__ = ["MappedFile", "is_mapped", "mapped_files"]

MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+\s*(.*)")
UNWRITTEN = re.compile(r"Anonymous:\s+0 kB")
SMAPS = Path("/proc/self/smaps")


@dataclass(frozen=True)
class MappedFile:
    """A part of a file that is mapped into this process's memory, all of it as the file has it.

    Args:
        start: the address of its first byte.
        stop: the address behind its last byte.
        offset: the place of its first byte in the file.
        path: the file.
    """

    start: int
    stop: int
    offset: int
    path: str

    def holds(self, tensor: Tensor, stored: StoredTensor) -> bool:
        """Return whether a tensor's memory is the stored tensor, in its file as it was opened.

        Args:
            tensor: a contiguous tensor on the CPU.
            stored: the tensor in its file.
        """
        address = tensor.data_ptr()
        if not self.start <= address or not address + stored.nbytes <= self.stop:
            return False
        if address - self.start + self.offset != stored.start:
            return False
        try:
            status = os.stat(self.path)
        except OSError:  # the file was removed or replaced
            return False
        identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        return identity == stored.identity


def mapped_files(smaps: Path = SMAPS) -> list[MappedFile]:
    """Return the parts of files that are mapped into this process and were not written to.

    Args:
        smaps: the system's list of them; only Linux has it.

    Returns:
        The parts; none where the system does not tell.
    """
    found: list[MappedFile] = []
    mapping: re.Match[str] | None = None
    try:
        lines = smaps.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return found
    for line in lines:
        mapping = MAPPING.fullmatch(line) or mapping
        if mapping is not None and mapping[4].startswith("/") and UNWRITTEN.fullmatch(line):
            start, stop, offset = (int(mapping[number], 16) for number in (1, 2, 3))
            found.append(MappedFile(start, stop, offset, mapping[4]))
    return found


def is_mapped(tensor: Tensor, stored: StoredTensor, files: list[MappedFile]) -> bool:
    """Return whether a tensor is known to be a stored tensor, without reading it.

    Args:
        tensor: a tensor.
        stored: the tensor in its file.
        files: returned by ``mapped_files``.
    """
    plain = tensor.device.type == "cpu" and tensor.is_contiguous()
    if not plain or tensor.nbytes != stored.nbytes:
        return False
    return any(file.holds(tensor, stored) for file in files)
