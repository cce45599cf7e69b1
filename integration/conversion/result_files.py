"""The files of a result, laid out before anything is written.

Each is a safetensors file: 8 bytes with the header's length, the header in JSON, the tensors. Laid
out from shapes alone, every tensor's place is known, and tensors can be written in any order.

Source: the format's description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from int4_lora.integration.checkpoint.safetensors_header import BITS
from int4_lora.integration.conversion.tasks import Task

__all__ = ["ResultFile", "index_of", "lay_out"]

ALIGNMENT = 8  # of the first tensor; larger items first keep the others aligned


@dataclass(frozen=True)
class ResultFile:
    """One safetensors file of a result.

    Args:
        name: its name.
        tasks: what makes its tensors.
        header: its first bytes, up to the tensors.
        places: the first byte of each tensor.
        size: its bytes.
    """

    name: str
    tasks: tuple[Task, ...]
    header: bytes
    places: Mapping[str, int]
    size: int


def lay_out(tasks: Sequence[Task], most_bytes: int) -> tuple[ResultFile, ...]:
    """Lay tensors out in files.

    Args:
        tasks: what makes them, in the order of the files; what a task makes stays together.
        most_bytes: of tensors in a file that has more than one task.

    Returns:
        The files, named as transformers names them.
    """
    parts = list(_parts(tasks, most_bytes))
    if len(parts) == 1:
        return (_file("model.safetensors", parts[0]),)
    count = len(parts)
    return tuple(
        _file(f"model-{number:05}-of-{count:05}.safetensors", part)
        for number, part in enumerate(parts, start=1)
    )


def index_of(files: Sequence[ResultFile]) -> dict[str, object] | None:
    """Return the index of several files, as JSON, or None for one."""
    if len(files) == 1:
        return None
    weight_map = {name: file.name for file in files for name in file.places}
    total = sum(task.nbytes for file in files for task in file.tasks)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _parts(tasks: Sequence[Task], most_bytes: int) -> Iterator[list[Task]]:
    """Yield the tasks of each file."""
    part: list[Task] = []
    held = 0
    for task in tasks:
        if part and held + task.nbytes > most_bytes:
            yield part
            part, held = [], 0
        part.append(task)
        held += task.nbytes
    yield part


def _file(name: str, tasks: Sequence[Task]) -> ResultFile:
    """Lay one file out."""
    outputs = [output for task in tasks for output in task.outputs]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for output in sorted(outputs, key=lambda one: (-BITS[one.dtype], one.name)):
        offsets[output.name] = end
        header[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [end, end + output.nbytes],
        }
        end += output.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    first = len(text).to_bytes(8, "little") + text
    places = {one: len(first) + offset for one, offset in offsets.items()}
    return ResultFile(name, tuple(tasks), first, places, len(first) + end)
