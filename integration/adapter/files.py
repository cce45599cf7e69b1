"""Find and open the files of an adapter's folder: its config and its tensors.

Source: ``load_peft_weights`` in ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

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
PICKLE_FILE = "adapter_model.bin"
CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('adapter_model.bin', weights_only=True), "
    "'adapter_model.safetensors')\""
)


def adapter_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of an adapter.

    Raises:
        FileNotFoundError: the folder does not exist, or has no ``adapter_config.json``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with an adapter")
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
        FileNotFoundError: the folder has no tensors.
        ValueError: the tensors are a pickle, or a file cannot be read or is outside the folder.
    """
    if (folder / TENSOR_FILE).is_file():
        return read_headers(inside(folder, TENSOR_FILE))
    if (folder / PICKLE_FILE).is_file():
        raise ValueError(
            f"{folder / PICKLE_FILE} is a pickle, which can run code and is not opened; "
            f"if you trust it, convert it there with: {CONVERT}"
        )
    raise FileNotFoundError(f"{folder / TENSOR_FILE} is not there")
