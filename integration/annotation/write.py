"""Record the modules that adapters can target in ``config.json`` and ``lora_metadata.json``.

In vLLM, ``vllm_plugin/metadata.py`` reads ``lora_metadata.json``.

Source: ``docs/commands/annotate.md``.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int4_lora.atomic_files import replace_files
from int4_lora.integration.annotation.metadata import KEYS, metadata_of, metadata_text
from int4_lora.integration.annotation.targets import lora_targets
from int4_lora.integration.checkpoint.open import Unlisted, open_checkpoint
from int4_lora.integration.checkpoint.quantization_config import CONFIG_KEYS, parts_of
from int4_lora.integration.vllm_plugin.metadata import FILE

__all__ = ["Annotation", "annotate", "preview_annotation"]

CONFIG = "config.json"
IN_CONFIG = ("lora_compatible", "lora_target_modules", "suggested_lora_targets")


@dataclass(frozen=True)
class Annotation:
    """The annotation of a checkpoint, and the files that it changes.

    Args:
        path: the checkpoint's folder.
        lora_compatible: whether vLLM with ``--quantization int4_lora`` takes adapters on its packed
            layers.
        incompatible_because: the reasons why it does not, one sentence each.
        lora_target_modules: the last parts of the names of modules that adapters can target.
        suggested_lora_targets: the entries of ``lora_target_modules`` that name only packed
            projections of layers.
        modules: the number of modules in ``lora_metadata.json``.
        changed: the names of the files that were written, or in a preview would be written.
    """

    path: Path
    lora_compatible: bool
    incompatible_because: tuple[str, ...]
    lora_target_modules: tuple[str, ...]
    suggested_lora_targets: tuple[str, ...]
    modules: int
    changed: tuple[str, ...]


def annotate(path: str | os.PathLike[str], *, unlisted: Unlisted | None = None) -> Annotation:
    """Record in a checkpoint which modules adapters can target.

    ``config.json`` gets ``lora_compatible``, ``lora_target_modules`` and
    ``suggested_lora_targets``; its other values and the order of its keys do not change.
    ``lora_metadata.json`` is replaced. A second call writes nothing. Each file is replaced
    atomically, so it is always complete, old or new.

    Args:
        path: the checkpoint's folder.
        unlisted: what to do with unlisted tensors, as in ``open_checkpoint``.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: the folder, or a file that it must have, does not exist.
        OSError: a file cannot be written; then none is changed.
        TypeError: a tensor has the wrong dtype.
        ValueError: the checkpoint cannot be read, tensors are unlisted or contradict each other,
            one of the two files is a link, ``config.json`` has a repeated key or a number too
            large for a float, or an existing ``lora_metadata.json`` holds anything else.

    Example:
        >>> oneshot(model="my-model", recipe=recipe, output_dir="my-W4A16")  # doctest: +SKIP
        >>> annotate("my-W4A16").suggested_lora_targets  # doctest: +SKIP
        ('down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj')
    """
    annotation, contents = _planned(Path(path), unlisted)
    replace_files(contents, like=annotation.path / CONFIG)
    return annotation


def preview_annotation(
    path: str | os.PathLike[str], *, unlisted: Unlisted | None = None
) -> Annotation:
    """Return the annotation that ``annotate`` would write, and write nothing.

    Args:
        path: the checkpoint's folder.
        unlisted: what to do with unlisted tensors, as in ``open_checkpoint``.

    Returns:
        The annotation.

    Raises:
        FileNotFoundError: the folder, or a file that it must have, does not exist.
        TypeError: a tensor has the wrong dtype.
        ValueError: as in ``annotate``.

    Example:
        >>> preview_annotation("my-W4A16").changed  # doctest: +SKIP
        ('lora_metadata.json', 'config.json')
    """
    return _planned(Path(path), unlisted)[0]


def _planned(folder: Path, unlisted: Unlisted | None) -> tuple[Annotation, Mapping[Path, bytes]]:
    """Return the annotation, and the new contents of the files that change."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a checkpoint")
    config, beside = folder / CONFIG, folder / FILE
    for file in (config, beside):
        _check_is_no_link(file)
    checkpoint = open_checkpoint(folder, unlisted=unlisted)
    checkpoint.check_listed()
    checkpoint.check_compressed_tensors("annotate")
    targets = lora_targets(checkpoint)
    metadata = metadata_of(checkpoint, targets)
    contents: dict[Path, bytes] = {}
    text = metadata_text(metadata).encode("ascii")
    if not beside.exists() or beside.read_bytes() != text:
        _check_is_ours(beside)
        contents[beside] = text
    new = _config_with(config, {key: metadata[key] for key in IN_CONFIG})
    if new is not None:
        contents[config] = new
    annotation = Annotation(
        path=folder,
        lora_compatible=targets.compatible,
        incompatible_because=targets.incompatible_because,
        lora_target_modules=targets.modules,
        suggested_lora_targets=targets.suggested,
        modules=len(metadata["modules"]),
        changed=tuple(file.name for file in contents),
    )
    return annotation, contents


def _config_with(file: Path, members: Mapping[str, Any]) -> bytes | None:
    """Return config.json with ``members`` set, as transformers writes it; None if unchanged.

    Members that a ``quantization_config`` already has are set there too, because vLLM refuses a
    config whose values contradict each other. No member is added to a ``quantization_config``.
    """
    try:
        config = json.loads(
            file.read_text(encoding="utf-8"),
            object_pairs_hook=_without_repeats,
            parse_float=_finite,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    new = {**copy.deepcopy(config), **members}
    for _, part in list(parts_of(new)):
        for inner in (part[key] for key in CONFIG_KEYS if isinstance(part.get(key), dict)):
            inner.update({key: value for key, value in members.items() if key in inner})
    text = json.dumps(new, indent=2)
    if text == json.dumps(config, indent=2):
        return None
    return (text + "\n").encode("ascii")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(
                f"the key {key!r} must not be repeated, one of its values would be lost"
            )
        members[key] = value
    return members


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large for a float and would be lost")
    return value


def _check_is_no_link(file: Path) -> None:
    """Refuse a link: its target may be shared, and replacing the link would detach it."""
    if file.is_symlink():
        raise ValueError(
            f"{file} must be a file, got a link to {os.readlink(file)}, which other folders may "
            "share, as in the hub's cache: copy the folder with cp -rL and annotate the copy"
        )


def _check_is_ours(file: Path) -> None:
    """Refuse to replace a ``lora_metadata.json`` that is not ours."""
    if not file.exists():
        return
    try:
        held = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is there and is not JSON: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} is there and must be an object, got {type(held).__name__}")
    others = [key for key in held if key not in KEYS]
    if others:
        raise ValueError(f"{file} is there and holds {others[0]!r}, which would be lost: move it")
