"""INT4 checkpoints of compressed-tensors, read lazily: opening one reads headers only.

Source: the ``pack-quantized`` format of compressed-tensors; ``docs/format.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from int4_lora.integration.json_files import read_json_object
from int4_lora.integration.quantization_config import Scheme, check_strategy, read_schemes
from int4_lora.reference import PackedWeight

__all__ = ["Checkpoint", "open_checkpoint"]

PACKED = ".weight_packed"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: where each tensor is and how each module is quantised.

    Args:
        path: the checkpoint's folder.
        config: the whole ``config.json``.
        files: the safetensors file of each tensor, by the tensor's name.
        schemes: how each quantised module is stored, by the module's name.
    """

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    schemes: Mapping[str, Scheme]

    def modules(self) -> list[str]:
        """Return the names of the quantised modules, in the order of the checkpoint."""
        return list(self.schemes)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: the tensor's full name.

        Returns:
            The tensor, on the CPU, in the dtype and shape it is stored in.

        Raises:
            ValueError: no such tensor, or a file that cannot be read.
        """
        if name not in self.files:
            raise ValueError(f"{self.path}: no tensor named {name!r}")
        with _opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def packed_weight(self, name: str) -> PackedWeight:
        """Read the packed weight of one quantised module.

        Args:
            name: the module's full name, one of ``modules()``.

        Returns:
            The checkpoint's tensors, unchanged.

        Raises:
            TypeError: a tensor of the wrong dtype.
            ValueError: no such module, a tensor that is missing, or one that contradicts the
                others or the config; the message names file, module and rule.
        """
        if name not in self.schemes:
            raise ValueError(f"{self.path}: no quantised module named {name!r}")
        scheme = self.schemes[name]
        where = f"{self.files[f'{name}.weight_packed']}: {name}"
        for part, rule in (
            ("weight_scale", "of a quantised module"),
            ("weight_shape", "of a packed module"),
            *((("weight_zero_point", "of an asymmetric module"),) if not scheme.symmetric else ()),
        ):
            if f"{name}.{part}" not in self.files:
                raise ValueError(f"{where}: {part} {rule} is missing")
        if scheme.symmetric and f"{name}.weight_zero_point" in self.files:
            raise ValueError(f"{where}: weight_zero_point is stored, but the config says symmetric")

        def optional(part: str) -> Tensor | None:
            return self.tensor(f"{name}.{part}") if f"{name}.{part}" in self.files else None

        shape = self.tensor(f"{name}.weight_shape")
        try:
            weight = PackedWeight(
                packed=self.tensor(f"{name}.weight_packed"),
                scale=self.tensor(f"{name}.weight_scale"),
                shape=tuple(shape.tolist()),
                zero_point=optional("weight_zero_point"),
                g_idx=optional("weight_g_idx"),
                group_size=scheme.group_size,
                bits=scheme.bits,
            )
            check_strategy(scheme, weight)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        return weight


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a local compressed-tensors checkpoint, in one file or sharded.

    Args:
        path: the folder with ``config.json`` and the safetensors files.

    Returns:
        The checkpoint; no tensor is read yet.

    Raises:
        FileNotFoundError: the folder, or a file it must have, is not there.
        ImportError: compressed-tensors, which parses the config, is not installed.
        ValueError: a file that cannot be read, or a quantisation this package does not take.

    Example:
        >>> checkpoint = open_checkpoint("my-model-W4A16")  # doctest: +SKIP
        >>> weight = checkpoint.packed_weight(checkpoint.modules()[0])  # doctest: +SKIP

    Source:
        The folder layout of transformers' ``save_pretrained``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a checkpoint")
    config = read_json_object(folder / "config.json")
    files = _tensor_files(folder)
    packed = [name.removesuffix(PACKED) for name in files if name.endswith(PACKED)]
    if not packed:
        raise ValueError(f"{folder}: no tensor named *.weight_packed: not a packed checkpoint")
    return Checkpoint(folder, config, files, read_schemes(folder / "config.json", config, packed))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; what it or the disk cannot give becomes a ValueError."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor."""
    single = folder / SINGLE_FILE
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must map tensor names to file names")
    present = {shard: _names(_shard_file(index, shard)) for shard in set(weight_map.values())}
    for name, shard in weight_map.items():
        if name not in present[shard]:
            raise ValueError(f"{index}: {name} is said to be in {shard}, which does not hold it")
    return {name: folder / shard for name, shard in weight_map.items()}


def _shard_file(index: Path, shard: str) -> Path:
    file = index.parent / shard
    if Path(shard).name != shard or shard in ("", ".", ".."):
        raise ValueError(f"{index}: a shard must be a file name in the folder, got {shard!r}")
    if not file.is_file():
        raise FileNotFoundError(f"{index} names {shard}, which is not there")
    return file


def _names(file: Path) -> list[str]:
    with _opened(file) as opened:
        return list(opened.keys())
