"""safetensors files of a folder: what they hold, read from their headers, and one tensor at a time.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from int4_lora.integration.json_files import read_json_object

__all__ = ["StoredTensor", "inside", "read_headers", "read_model_headers", "read_tensor"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    Args:
        file: the safetensors file.
        dtype: the format's name of the dtype, for example "BF16" or "I32".
        shape: the shape.
    """

    file: Path
    dtype: str
    shape: Sequence[int]


def read_headers(file: Path) -> dict[str, StoredTensor]:
    """Return every tensor of one file by name; only the header is read.

    Args:
        file: a safetensors file.

    Raises:
        ValueError: the file is no readable safetensors file.
    """
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: StoredTensor(file, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """Read one tensor, to the CPU.

    Args:
        stored: where it is.
        name: its name there.

    Raises:
        ValueError: the file is no readable safetensors file, or no longer holds the tensor.
    """
    with _opened(stored.file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def read_model_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a model by name, from one file or from shards with an index.

    Args:
        folder: the model's folder.

    Raises:
        FileNotFoundError: neither the one file nor the index is there, or a shard is missing.
        ValueError: a file that cannot be read or is outside the folder, or an index that lies.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_headers(inside(folder, SINGLE_FILE))
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    index = inside(folder, INDEX_FILE)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    present = {
        shard: read_headers(_shard_file(index, folder, shard))
        for shard in sorted(set(weight_map.values()))
    }
    for name, shard in weight_map.items():
        if name not in present[shard]:
            raise ValueError(f"{index}: {name} is said to be in {shard}, which does not hold it")
    return {name: present[shard][name] for name, shard in weight_map.items()}


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``, which must stay in the folder when links are followed.

    The cache of the Hugging Face hub links its snapshots to files beside them; those may be used.

    Raises:
        ValueError: the file is elsewhere.
    """
    file, home = folder / name, folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(file.resolve().is_relative_to(root) for root in allowed):
        raise ValueError(f"{file} is a link that leaves the folder")
    return file


def _shard_file(index: Path, folder: Path, shard: str) -> Path:
    if Path(shard).name != shard or shard in ("", ".", "..") or "\0" in shard:
        raise ValueError(f"{index}: a shard must be a file name in the folder, got {shard!r}")
    try:
        file = inside(folder, shard)
        there = file.is_file()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"{index}: {shard[:80]!r} cannot be a file name: {error}") from error
    if not there:
        raise FileNotFoundError(f"{index} names {shard}, which is not there")
    return file


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; what it cannot give becomes a ValueError."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error
