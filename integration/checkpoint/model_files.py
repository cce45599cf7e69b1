"""Find the tensors of a model in its folder, and those that its index does not name.

``model.safetensors`` is the model; else the shards of ``model.safetensors.index.json`` are.
transformers reads every tensor of the shards that the index names, whatever else it says; other
files it does not read. So a tensor without its entry is part of the model, or left over from
before: only its owner knows.

Source: ``transformers/modeling_utils.py``; the folder layout of ``save_pretrained``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int4_lora.integration.adapter.files import TENSOR_FILES, holds_adapter
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, inside
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor, read_headers

__all__ = [
    "ModelFiles",
    "UnlistedFile",
    "describe_left",
    "describe_unlisted",
    "read_model_files",
    "with_unlisted",
]

MOST_NAMES = 8  # of a file in a message


@dataclass(frozen=True)
class UnlistedFile:
    """A file of a model's folder with tensors that are not listed as the model's.

    Args:
        file: the safetensors file.
        named: whether the model's list names the file for other tensors.
        tensors: the tensors that are in the file, and not in the list.
        copies: the tensors that are in the file, and in the list for another file.
        fault: why the file cannot be read, or None.
    """

    file: Path
    named: bool
    tensors: Mapping[str, StoredTensor]
    copies: Mapping[str, StoredTensor]
    fault: str | None = None


@dataclass(frozen=True)
class ModelFiles:
    """The safetensors files of a model's folder.

    Args:
        list_name: the name of the file that says which tensors are the model's.
        tensors: the tensors of the model, by name.
        unlisted: the files with other tensors.
    """

    list_name: str
    tensors: Mapping[str, StoredTensor]
    unlisted: Sequence[UnlistedFile]


def read_model_files(folder: Path) -> ModelFiles:
    """Return every tensor in the safetensors files of a folder, listed or not.

    Only headers are read. Hidden files and an adapter's files are not looked at.

    Args:
        folder: the model's folder.

    Raises:
        FileNotFoundError: the folder has neither the single file nor the index, or lacks a shard.
        ValueError: a file of the model cannot be read or is outside the folder, or the index names
            a tensor that is not where it says.
    """
    single, indexed = (folder / SINGLE_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if not single and not indexed:
        raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    if single:
        present = {SINGLE_FILE: read_headers(inside(folder, SINGLE_FILE))}
        weight_map = dict.fromkeys(present[SINGLE_FILE], SINGLE_FILE)
    else:
        weight_map = _read_index(folder)
        present = {
            shard: read_headers(_shard_file(folder, shard))
            for shard in sorted(set(weight_map.values()))
        }
        _check_held(folder, weight_map, present)
    listed = {name: present[shard][name] for name, shard in weight_map.items()}
    files = [_sorted_out(folder / shard, True, held, listed) for shard, held in present.items()]
    files += [_other_file(folder, file, listed) for file in _other_files(folder, present)]
    unlisted = [file for file in files if file.tensors or file.copies or file.fault]
    if single and indexed:  # transformers reads the single file, vLLM what the index names
        held = {*listed, *_all(unlisted)}
        for name, shard in _read_index(folder).items():
            if name not in held:
                index = folder / INDEX_FILE
                raise ValueError(f"{index}: {name} is said to be in {shard}, and is in no file")
    return ModelFiles(SINGLE_FILE if single else INDEX_FILE, listed, tuple(unlisted))


def with_unlisted(folder: Path, files: ModelFiles) -> dict[str, StoredTensor]:
    """Return the tensors of a model, the unlisted ones included.

    Args:
        folder: the model's folder.
        files: its files.

    Raises:
        ValueError: a name would have two tensors, or a file cannot be read.
    """
    why = _why_not_take(files.unlisted)
    if why:
        raise ValueError(f"{folder}: the unlisted tensors cannot be taken: {why}")
    return {**files.tensors, **_all(files.unlisted)}


def describe_unlisted(files: ModelFiles) -> str:
    """Return one sentence about the unlisted tensors, and what can be done about them."""
    parts = [part for file in files.unlisted for part in _parts(file, files.list_name)]
    leave = '--unlisted leave (in Python unlisted="leave") goes without what is unlisted'
    why = _why_not_take(files.unlisted)
    if why:
        return f"{'; '.join(parts)}. {leave}; they cannot be taken: {why}"
    take = '--unlisted take (in Python unlisted="take") reads what is unlisted as part of the model'
    return f"{'; '.join(parts)}. {take}, {leave}"


def describe_left(files: ModelFiles) -> tuple[str, ...]:
    """Return one sentence for each file of the model that holds unlisted tensors."""
    return tuple(
        f"left behind: {part}"
        for file in files.unlisted
        if file.named
        for part in _parts(file, files.list_name)
    )


def _parts(file: UnlistedFile, list_name: str) -> list[str]:
    """Return what is unlisted in one file, in words."""
    single = list_name == SINGLE_FILE
    unnamed = f"is not read beside {list_name}" if single else f"is not named by {list_name}"
    if file.fault is not None:
        return [f"{file.file.name} {unnamed}, and cannot be read: {file.fault}"]
    parts = []
    if file.tensors:
        left_out = f"which {list_name} leaves out" if file.named else f"and {unnamed}"
        parts.append(f"{file.file.name} holds {_shown(file.tensors)}, {left_out}")
    if file.copies:
        listed = f"which {list_name} lists in another file" if file.named else f"and {unnamed}"
        parts.append(f"{file.file.name} holds {_shown(file.copies)} too, {listed}")
    return parts


def _shown(names: Mapping[str, Any]) -> str:
    first = ", ".join(list(names)[:MOST_NAMES])
    others = len(names) - MOST_NAMES
    return f"{first} and {others} more tensors" if others > 0 else first


def _why_not_take(unlisted: Sequence[UnlistedFile]) -> str | None:
    """Return why the unlisted tensors cannot be a part of the model, or None."""
    places: dict[str, str] = {}
    for file in unlisted:
        if file.fault is not None:
            return file.fault
        for name in file.copies:
            return f"{name} would be in two files, one of them {file.file.name}"
        for name in file.tensors:
            if name in places:
                return f"{name} is in {places[name]} and in {file.file.name}"
            places[name] = file.file.name
    return None


def _all(unlisted: Sequence[UnlistedFile]) -> dict[str, StoredTensor]:
    return {name: stored for file in unlisted for name, stored in file.tensors.items()}


def _sorted_out(
    file: Path, named: bool, held: Mapping[str, StoredTensor], listed: Mapping[str, StoredTensor]
) -> UnlistedFile:
    """Return a file with those of its tensors that the list does not place there."""
    others = {
        name: stored
        for name, stored in held.items()
        if name not in listed or listed[name].file != stored.file
    }
    return UnlistedFile(
        file,
        named,
        {name: stored for name, stored in others.items() if name not in listed},
        {name: stored for name, stored in others.items() if name in listed},
    )


def _other_files(folder: Path, present: Mapping[str, Any]) -> list[Path]:
    """Return the safetensors files of a folder that are neither the model's nor an adapter's."""
    adapter = holds_adapter(folder)
    return [
        file
        for file in sorted(folder.glob("*.safetensors"))
        if file.name not in present and not file.name.startswith(".") and not file.is_dir()
        if not (adapter and TENSOR_FILES.fullmatch(file.name))
    ]


def _other_file(folder: Path, file: Path, listed: Mapping[str, StoredTensor]) -> UnlistedFile:
    try:
        place = inside(folder, file.name)
        if not place.is_file():
            raise ValueError(f"{file} is no file")
        return _sorted_out(file, False, read_headers(place), listed)
    except (OSError, ValueError) as error:
        return UnlistedFile(file, False, {}, {}, fault=str(error))


def _read_index(folder: Path) -> dict[str, str]:
    """Return the shard of each tensor by the index."""
    index = inside(folder, INDEX_FILE)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    return weight_map


def _check_held(
    folder: Path,
    weight_map: Mapping[str, str],
    present: Mapping[str, Mapping[str, StoredTensor]],
) -> None:
    """Check that every tensor of the index is in its file."""
    for name, shard in weight_map.items():
        if name not in present[shard]:
            index = folder / INDEX_FILE
            holder = next((other for other, held in present.items() if name in held), None)
            where = f"; {holder} holds it: correct the index" if holder else ""
            raise ValueError(
                f"{index}: {name} is said to be in {shard}, which does not hold it{where}"
            )


def _shard_file(folder: Path, shard: str) -> Path:
    index = folder / INDEX_FILE
    if Path(shard).name != shard or shard in ("", ".", "..") or "\0" in shard:
        raise ValueError(f"{index}: a shard must be a file name in the folder, got {shard!r}")
    try:
        file = inside(folder, shard)
        exists = file.is_file()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{index}: {shard[:80]!r} cannot be a file name: {error}") from error
    if not exists:
        raise FileNotFoundError(f"{index} names {shard}, which is not there")
    return file
