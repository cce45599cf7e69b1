"""The files beside a model's weights: tokenizer, templates, code, adapters.

Source: the folder layout of transformers' ``save_pretrained``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from int4_lora.atomic_files import sync_file
from int4_lora.integration.adapter.files import CONFIG_FILE
from int4_lora.integration.checkpoint.safetensors_files import inside

__all__ = ["copy_files", "other_files"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot")
INDEXES = ("safetensors.index.json", "bin.index.json")
ABOUT_THE_WEIGHTS = ("config.json", "lora_metadata.json", "merge_report.json")
ADAPTER = re.compile(r"adapter_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def other_files(folder: Path, merged: Iterable[Path] = ()) -> list[str]:
    """Return the names, relative to the folder, of the files to copy to a result.

    These are all files but weights in any format, hidden files and folders, and files that
    describe the weights. An adapter that lies in the folder is copied, config and tensors, unless
    it is one of ``merged``: its config alone would make transformers look for its tensors, and
    together they would add what the weights contain already.

    Args:
        folder: a model's folder.
        merged: the folders of adapters that the result's weights contain.

    Raises:
        ValueError: a file is a link that leads out of the folder.
    """
    names = []
    contained = {place.resolve() for place in merged}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        weights = file.suffix in WEIGHTS or file.name.endswith(INDEXES)
        if file.name == CONFIG_FILE or ADAPTER.fullmatch(file.name):
            weights = file.parent.resolve() in contained or not _is_adapter(file.parent)
        if hidden or weights or str(name) in ABOUT_THE_WEIGHTS:
            continue
        if inside(folder, str(name)).is_file():
            names.append(str(name))
    return names


def _is_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter's config and its tensors."""
    tensors = any(ADAPTER.fullmatch(file.name) for file in folder.iterdir())
    return tensors and (folder / CONFIG_FILE).is_file()


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
