"""The files beside a model's weights: tokenizer, templates, code.

Source: the folder layout of transformers' ``save_pretrained``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from int4_lora.atomic_files import sync_file
from int4_lora.integration.checkpoint.safetensors_files import inside

__all__ = ["copy_files", "other_files"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot")
INDEXES = ("safetensors.index.json", "bin.index.json")
ABOUT_THE_WEIGHTS = ("config.json", "lora_metadata.json", "merge_report.json")


def other_files(folder: Path) -> list[str]:
    """Return the names, relative to the folder, of the files to copy to a result.

    These are all files but weights in any format, hidden files and folders, and files that
    describe the weights.

    Args:
        folder: a model's folder.

    Raises:
        ValueError: a file is a link that leads out of the folder.
    """
    names = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = file.suffix in WEIGHTS or file.name.endswith(INDEXES)
        if hidden or weights or str(name) in ABOUT_THE_WEIGHTS:
            continue
        if inside(folder, str(name)).is_file():
            names.append(str(name))
    return names


def copy_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Copy files from one folder to another and flush them to the disk.

    Args:
        folder: the folder to copy from.
        names: the files, relative to the folder.
        target: the folder to copy to.
    """
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, place)
        sync_file(place)
