"""What stands in a model's folder beside its weights: tokenizer, templates, code.

Source: the folder layout of transformers' ``save_pretrained``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from int4_lora.atomic_files import sync_file
from int4_lora.integration.checkpoint.safetensors_files import inside

__all__ = ["copy_files", "other_files"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot")
INDEXES = ("safetensors.index.json", "bin.index.json")
MADE_ANEW = ("config.json", "lora_metadata.json", "merge_report.json")


def other_files(folder: Path) -> list[str]:
    """Return the files that are carried along, relative to the folder.

    Weights in any format, hidden files and folders, and files that describe the quantised weights
    are not.

    Args:
        folder: a model's folder.

    Raises:
        ValueError: a file that is a link which leaves the folder.
    """
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = file.suffix in WEIGHTS or file.name.endswith(INDEXES)
        if hidden or weights or str(name) in MADE_ANEW:
            continue
        if inside(folder, str(name)).is_file():
            found.append(str(name))
    return found


def copy_files(folder: Path, names: list[str], target: Path) -> None:
    """Copy files of a folder to another, and force them to the disk.

    Args:
        folder: where they are.
        names: relative to it.
        target: where they go.
    """
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, place)
        sync_file(place)
