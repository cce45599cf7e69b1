"""The files beside a model's weights: tokenizer, templates, code, adapters.

Source: the folder layout of transformers' ``save_pretrained``.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from int4_lora.atomic_files import sync_file
from int4_lora.integration.adapter.files import CONFIG_FILE, TENSOR_FILES, holds_adapter
from int4_lora.integration.checkpoint.safetensors_files import inside

__all__ = ["copy_files", "other_files", "weight_files"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot")
INDEXES = ("safetensors.index.json", "bin.index.json")
ABOUT_THE_WEIGHTS = ("config.json", "lora_metadata.json", "merge_report.json")


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
    contained = {place.resolve() for place in merged}
    return [
        name
        for name in _visible_files(folder)
        if name not in ABOUT_THE_WEIGHTS and _is_copied(folder / name, contained)
        if inside(folder, name).is_file()
    ]


def _is_copied(file: Path, contained: Collection[Path]) -> bool:
    """Return whether a file holds no weights, or an adapter that is not in ``contained``."""
    if file.name == CONFIG_FILE or TENSOR_FILES.fullmatch(file.name):
        return file.parent.resolve() not in contained and holds_adapter(file.parent)
    return not file.name.endswith((*WEIGHTS, *INDEXES))


def weight_files(folder: Path, merged: Iterable[Path] = ()) -> list[str]:
    """Return the names, relative to the folder, of the files with weights in any format.

    Args:
        folder: a model's folder.
        merged: the folders of adapters that the result's weights contain, which are left out.
    """
    contained = {place.resolve() for place in merged}
    return [
        name
        for name in _visible_files(folder)
        if name.endswith(WEIGHTS)
        if not TENSOR_FILES.fullmatch(Path(name).name)
        or (folder / name).parent.resolve() not in contained
    ]


def _visible_files(folder: Path) -> list[str]:
    """Return the paths below a folder, relative to it, of which no part is hidden."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*"))]
    return [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]


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
