"""Find and open the files of an adapter's folder: its config and its tensors.

PEFT writes one file of tensors. Shards with an index, or shards numbered 1 to n without one, are
read under the rule for checkpoints: no tensor may be missing, and none may lie beside the index.

Source: ``load_peft_weights`` in ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from int4_lora.integration.checkpoint.hub import HUB_ID
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import inside
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor, read_headers

__all__ = [
    "CONFIG_FILE",
    "TENSOR_FILE",
    "TENSOR_FILES",
    "adapter_folder",
    "holds_adapter",
    "stored_tensors",
]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
TENSOR_FILES = re.compile(r"adapter_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
INDEX_FILE = "adapter_model.safetensors.index.json"
SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors")
PICKLE_FILE = "adapter_model.bin"
OTHER_FILES = {
    "new_embeddings.safetensors": "the embeddings of added tokens",
    "new_embeddings.bin": "the embeddings of added tokens",
    "non_lora_trainables.bin": "trained weights that are no LoRA",  # LLaVA
    "non_lora_state_dict.bin": "trained weights that are no LoRA",
}
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('adapter_model.bin', weights_only=True), "
    "'adapter_model.safetensors')\""
)


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: the folder does not exist, or has no ``adapter_config.json``; if ``path``
            may be a name on the Hugging Face hub, the message says how to download it.
    """
    folder = Path(path)
    if not folder.is_dir():
        message = f"{folder} is not a folder with an adapter"
        if not folder.exists() and HUB_ID.fullmatch(os.fspath(path)):
            message += (
                "; if it is a name on the Hugging Face hub, download it first, with "
                f"hf download {folder.as_posix()} --local-dir FOLDER"
            )
        raise FileNotFoundError(message)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder / CONFIG_FILE} is not there{_what_is_there(folder)}")
    return folder


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter's config and its tensors."""
    tensors = any(TENSOR_FILES.fullmatch(file.name) for file in folder.iterdir())
    return tensors and (folder / CONFIG_FILE).is_file()


def _what_is_there(folder: Path) -> str:
    """Return what a folder without an adapter's config holds, or an empty string."""
    within = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
    if within:
        return f", but in {', '.join(within)} there is one"
    return ": the folder holds a model" if (folder / "config.json").is_file() else ""


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of an adapter by their keys, reading headers only.

    Args:
        folder: the adapter's folder.

    Raises:
        FileNotFoundError: the folder has no tensors, or lacks a shard that the index names.
        ValueError: trained weights lie in other files, the tensors are a pickle, a file cannot be
            read or is outside the folder, one file and shards lie side by side, shards and index do
            not hold the same tensors, or shards without an index are not numbered 1 to n.
    """
    _check_nothing_else_is_trained(folder)
    shards = sorted(file.name for file in folder.iterdir() if SHARD.fullmatch(file.name))
    has_index = (folder / INDEX_FILE).is_file()
    if (folder / TENSOR_FILE).is_file():
        if has_index or shards:
            beside = INDEX_FILE if has_index else shards[0]
            raise ValueError(
                f"{folder} holds {TENSOR_FILE} and {beside}, of which one is the adapter; remove "
                "the other (PEFT reads the first)"
            )
        return read_headers(inside(folder, TENSOR_FILE))
    if has_index:
        return _indexed(folder, shards)
    if shards:
        _check_numbered(folder, shards)
        return _joined(folder, shards)
    if (folder / PICKLE_FILE).is_file():
        raise ValueError(
            f"{folder / PICKLE_FILE} is a pickle, which can run code and is not opened; "
            f"if you trust it, convert it there with: {CONVERT}"
        )
    raise FileNotFoundError(f"{folder / TENSOR_FILE} is not there")


def _check_nothing_else_is_trained(folder: Path) -> None:
    """Refuse weights beside the adapter, which PEFT does not read: they would be lost."""
    for name, what in OTHER_FILES.items():
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name} holds {what}, which would be lost; move it away to go on without"
            )


def _indexed(folder: Path, shards: Sequence[str]) -> dict[str, StoredTensor]:
    """Return the tensors of shards that an index lists."""
    index = inside(folder, INDEX_FILE)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and SHARD.fullmatch(shard) for shard in weight_map.values()
    ):
        raise ValueError(
            f"{index}: weight_map must map keys to files named like "
            "adapter_model-00001-of-00002.safetensors"
        )
    for shard in weight_map.values():
        if shard not in shards:
            raise FileNotFoundError(f"{index} names {shard}, which is not there")
    tensors = _joined(folder, shards)
    for key, shard in weight_map.items():
        if key not in tensors or tensors[key].file.name != shard:
            raise ValueError(f"{index}: {key} is said to be in {shard}, which does not hold it")
    unlisted = [key for key in tensors if key not in weight_map]
    if unlisted:
        raise ValueError(
            f"{index}: {unlisted[0]} is not listed, but lies in {tensors[unlisted[0]].file.name} "
            f"({len(unlisted)} such keys); list it, or remove it from there"
        )
    return tensors


def _check_numbered(folder: Path, shards: Sequence[str]) -> None:
    """Check that no shard is missing, where there is no index."""
    counts = sorted({name.rpartition("-of-")[2] for name in shards})
    if len(counts) > 1:
        raise ValueError(f"{folder} holds shards of several adapters: -of-{', -of-'.join(counts)}")
    total = int(counts[0].partition(".")[0])
    numbers = sorted(int(match[1]) for match in map(SHARD.fullmatch, shards) if match)
    if len(numbers) != total or numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"{folder} must hold shards 1 to {total} of the adapter, got {numbers}")


def _joined(folder: Path, shards: Iterable[str]) -> dict[str, StoredTensor]:
    """Return the tensors of all shards; the same key in two of them is refused."""
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(shards):
        file = inside(folder, shard)
        for key, stored in read_headers(file).items():
            if key in tensors:
                raise ValueError(f"{file}: {key} lies in {tensors[key].file.name}, too")
            tensors[key] = stored
    return tensors
