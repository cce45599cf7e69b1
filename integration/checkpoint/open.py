"""Open INT4 checkpoints of compressed-tensors; tensors are read only when requested.

Source: the ``pack-quantized`` format of compressed-tensors; ``docs/format.md``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.hub import local_folder
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.misplaced_adapters import (
    check_is_no_adapter,
    check_no_adapter_within,
)
from int4_lora.integration.checkpoint.safetensors_files import (
    DTYPES,
    inside,
    read_model_headers,
    read_tensor,
)
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.checkpoint.scheme import (
    PACKED_FORMAT,
    Scheme,
    check_strategy,
    read_quantization,
    read_schemes,
)
from int4_lora.reference import PackedWeight

__all__ = ["PARTS", "Checkpoint", "open_checkpoint"]

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

# Every quantised module has at least one of these.
MARKS = (".weight_packed", ".weight_scale")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: its tensors, and how each module is quantised.

    Args:
        path: the checkpoint's folder.
        config: the content of ``config.json``.
        tensors: file, dtype and shape of every tensor, by the tensor's name.
        schemes: how each quantised module is stored, by the module's name.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    schemes: Mapping[str, Scheme]

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The part of ``config.json`` that describes the quantisation."""
        return read_quantization(self.path / "config.json", self.config)

    def modules(self) -> list[str]:
        """Return the names of the quantised modules, in the order of the checkpoint."""
        return list(self.schemes)

    def is_packed(self, name: str) -> bool:
        """Return whether ``packed_weight`` can read a module: pack-quantized, int, 4 or 8 bits."""
        scheme = self.schemes[name]
        return (scheme.format, scheme.kind) == (PACKED_FORMAT, "int") and scheme.bits in (4, 8)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: the tensor's full name.

        Returns:
            The tensor, on the CPU, in its stored dtype and shape.

        Raises:
            ValueError: the tensor does not exist, or its file cannot be read.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: no tensor named {name!r}")
        inside(self.path, self.tensors[name].file.name)  # a link may have replaced the file
        return read_tensor(self.tensors[name], name)

    def shape_of(self, name: str) -> tuple[int, int]:
        """Return a quantised module's ``weight_shape``: ``(out_features, in_features)``.

        Raises:
            ValueError: ``weight_shape`` is missing, or does not hold two positive int64.
        """
        full = f"{name}.weight_shape"
        if full not in self.tensors:
            raise ValueError(f"{self.path}: {name}: weight_shape is missing")
        stored = self.tensors[full]
        if stored.dtype != "I64" or tuple(stored.shape) != (2,):
            shown = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(f"{stored.file}: {name}: weight_shape must be I64 [2], got {shown}")
        rows, columns = self.tensor(full).tolist()
        if rows < 1 or columns < 1:
            raise ValueError(
                f"{stored.file}: {name}: weight_shape must be two positive lengths, "
                f"got [{rows}, {columns}]"
            )
        return rows, columns

    def packed_weight(self, name: str) -> PackedWeight:
        """Read the packed weight of one quantised module.

        Args:
            name: the module's full name, one of ``modules()``.

        Returns:
            The packed weight, with the checkpoint's tensors unchanged.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: the module does not exist or has another format, or a tensor is missing or
                contradicts the other tensors or the config; the message names file, module and
                rule.
        """
        return self._packed_weight(name, self.tensor)

    def check(self, name: str) -> None:
        """Check a quantised module by its headers and its ``weight_shape`` alone.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: as in ``packed_weight``, as far as shapes and dtypes show it.
        """
        self._packed_weight(name, self._described)

    def _packed_weight(self, name: str, get: Callable[[str], Tensor]) -> PackedWeight:
        """Return a packed weight, reading its tensors with ``get``."""
        if name not in self.schemes:
            raise ValueError(f"{self.path}: no quantised module named {name!r}")
        scheme = self.schemes[name]
        first = next(mark for mark in MARKS if name + mark in self.tensors)
        where = f"{self.tensors[name + first].file}: {name}"
        if not self.is_packed(name):
            raise ValueError(
                f"{where}: is {scheme.format} ({scheme.kind}, {scheme.bits} bits), "
                f"not {PACKED_FORMAT} of int, 4 or 8 bits"
            )
        self._check_parts(where, name, scheme)
        shape = self.shape_of(name)
        tensors = {
            part: get(f"{name}.{part}")
            for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
            if f"{name}.{part}" in self.tensors
        }
        try:
            weight = PackedWeight(
                packed=tensors["weight_packed"],
                scale=tensors["weight_scale"],
                shape=shape,
                zero_point=tensors.get("weight_zero_point"),
                g_idx=tensors.get("weight_g_idx"),
                group_size=scheme.group_size,
                bits=scheme.bits,
            )
            check_strategy(scheme, weight)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        return weight

    def _described(self, name: str) -> Tensor:
        """Return a tensor without data, with the dtype and shape of the header."""
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ValueError(f"{stored.file}: {name}: torch cannot hold the dtype {stored.dtype}")
        return torch.empty(tuple(stored.shape), dtype=DTYPES[stored.dtype], device="meta")

    def _check_parts(self, where: str, name: str, scheme: Scheme) -> None:
        needed = {"weight_packed": "a packed", "weight_scale": "a quantised"}
        needed["weight_shape"] = "a packed"
        if not scheme.symmetric:
            needed["weight_zero_point"] = "an asymmetric"
        elif f"{name}.weight_zero_point" in self.tensors:
            raise ValueError(f"{where}: weight_zero_point is stored, but the config says symmetric")
        for part, kind in needed.items():
            if f"{name}.{part}" not in self.tensors:
                raise ValueError(f"{where}: {part} of {kind} module is missing")
        if scheme.actorder == "group" and f"{name}.weight_g_idx" not in self.tensors:
            rule = "with actorder 'group'"
            raise ValueError(f"{where}: weight_g_idx of a module {rule} is missing")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a compressed-tensors checkpoint, in one file or sharded.

    Args:
        path: the folder with ``config.json`` and the safetensors files, or the ``owner/name`` of
            a model on the Hugging Face hub, which is downloaded unless it is in the hub's cache.

    Returns:
        The checkpoint, before any tensor is read.

    Raises:
        FileNotFoundError: the folder, or a file that it must have, does not exist.
        ImportError: ``path`` is a name on the hub, and huggingface_hub is not installed.
        ValueError: a file cannot be read or is outside the folder, or the quantisation is not
            compressed-tensors'.

    Example:
        >>> checkpoint = open_checkpoint("my-model-W4A16")  # doctest: +SKIP
        >>> weight = checkpoint.packed_weight(checkpoint.modules()[0])  # doctest: +SKIP

    Source:
        The folder layout of transformers' ``save_pretrained``.
    """
    folder = local_folder(path)
    check_is_no_adapter(folder)
    file = inside(folder, "config.json")
    config = read_json_object(file)
    tensors = read_model_headers(folder)
    check_no_adapter_within(folder, tensors)
    quantised = dict.fromkeys(
        name.removesuffix(mark) for name in tensors for mark in MARKS if name.endswith(mark)
    )
    if not quantised:
        raise ValueError(f"{folder}: no tensor named *.weight_packed: not a packed checkpoint")
    return Checkpoint(folder, config, tensors, read_schemes(file, config, quantised))
