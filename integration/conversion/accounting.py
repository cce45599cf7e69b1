"""Check that no tensor is lost: neither in the plan of a conversion, nor in its written result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import INDEX_FILE
from int4_lora.integration.checkpoint.safetensors_header import read_headers
from int4_lora.integration.conversion.result_files import ResultFile, index_of
from int4_lora.integration.conversion.tasks import Task

__all__ = ["check_accounted", "check_written"]

Described = dict[str, tuple[str, str, tuple[int, ...]]]  # file, dtype and shape by name


def check_accounted(
    source: Path, tensors: Collection[str], tasks: Sequence[Task], dropped: Mapping[str, str]
) -> None:
    """Check that a plan uses every tensor of the source once, and makes no name twice.

    Args:
        source: the checkpoint's folder, for the messages.
        tensors: the names of the source's tensors.
        tasks: the tasks of the plan.
        dropped: the tensors that the result has no place for, and why.

    Raises:
        ValueError: a tensor is used twice or not at all, or two tasks make a tensor of one name;
            the message names it.
    """
    used = [*(name for task in tasks for name in task.consumed), *dropped]
    made = [output.name for task in tasks for output in task.outputs]
    for rule, names in (
        ("would be lost: no step of the plan uses it", sorted({*tensors}.difference(used))),
        ("is not in the checkpoint, but the plan uses it", sorted({*used}.difference(tensors))),
        ("would be used by two steps of the plan", _repeated(used)),
        ("would be made by two steps of the plan", _repeated(made)),
    ):
        if names:
            others = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
            raise ValueError(f"{source}: {names[0]} {rule}{others}")


def check_written(folder: Path, files: Sequence[ResultFile], copied: Collection[str]) -> None:
    """Check that the written files hold the tensors of the plan, and the index names them.

    The headers are read back.

    Args:
        folder: the folder of the written files.
        files: the files as they were planned.
        copied: the other files that were put there, such as those of an adapter.

    Raises:
        OSError: a file is missing.
        ValueError: a tensor is missing, not planned, in another file, or of another dtype or shape
            than planned; the message names it.
    """
    planned: Described = {
        output.name: (file.name, output.dtype, output.shape)
        for file in files
        for task in file.tasks
        for output in task.outputs
    }
    there = {file.name for file in folder.glob("*.safetensors")}.difference(copied)
    names = there.union(file.name for file in files)
    found = [
        (name, (file, stored.dtype, tuple(stored.shape)))
        for file in sorted(names)
        for name, stored in read_headers(folder / file).items()
    ]
    repeated = _repeated(name for name, _ in found)
    if repeated:
        raise ValueError(f"{folder}: {repeated[0]} is in two files of the result")
    _check_same(folder, "the files", planned, dict(found))
    index = index_of(files)
    if index is not None:
        listed = read_json_object(folder / INDEX_FILE).get("weight_map")
        by_plan = {name: file for name, (file, _, _) in planned.items()}
        _check_same(folder, INDEX_FILE, by_plan, listed if isinstance(listed, dict) else {})


def _check_same(
    folder: Path, where: str, planned: Mapping[str, object], found: Mapping[str, object]
) -> None:
    """Check that what was found is what was planned, tensor by tensor."""
    for name in sorted({*planned, *found}):
        if planned.get(name) != found.get(name):
            raise ValueError(
                f"{folder}: the result is not as planned: {name} must be "
                f"{_shown(planned.get(name))} in {where}, got {_shown(found.get(name))}"
            )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        file, dtype, shape = value
        return f"{dtype} {list(shape)} of {file}"
    return "absent" if value is None else repr(value)


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
