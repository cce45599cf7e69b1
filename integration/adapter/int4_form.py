"""How an adapter is stored in INT4: its keys, and what its config says.

``lora_A.weight`` becomes ``lora_A.weight_packed``, ``lora_A.weight_scale``, ``lora_A.weight_shape``
and, with zero-points, ``lora_A.weight_zero_point``, as compressed-tensors stores the weight of a
linear layer; so does ``lora_B.weight``. Pairs of embeddings and whole tensors stay as they are.

``peft_type`` is "LORA_INT4", and ``quantization_config`` has the group size. A tool that does not
know the form misses the keys of all pairs. PEFT only warns of missing keys and would go on with an
adapter that adds zero; it stops at the unknown ``peft_type``.

Source: ``compressed_tensors/compressors/pack_quantized/base.py`` for the tensors,
``PeftConfigMixin.from_peft_type`` in ``peft/config.py`` for ``peft_type``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.files import CONFIG_FILE
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.reference import PackedWeight
from int4_lora.reference.lora_stack import quantize_lora_matrix

__all__ = [
    "PACKED_KEY",
    "PEFT_TYPE",
    "QUANTIZED_MATRIX",
    "Int4Form",
    "form_and_plain_config",
    "int4_config",
    "int4_tensors",
    "is_int4",
]

PEFT_TYPE = "LORA_INT4"
RECORD = "quantization_config"
PARTS = "packed|scale|shape|zero_point"
QUANTIZED_MATRIX = re.compile(r"(.+\.)?lora_[AB](\.[^.]+)?\.weight")
PACKED_KEY = re.compile(
    rf"(?P<matrix>{QUANTIZED_MATRIX.pattern})_(?P<part>packed|scale|shape|zero_point)"
)
FIXED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "num_bits": 4}


@dataclass(frozen=True)
class Int4Form:
    """How the matrices of an adapter are quantised.

    Args:
        group_size: columns that share a scale; a matrix with no more columns has one group per row.
        symmetric: whether no zero-points are stored.
    """

    group_size: int = 128
    symmetric: bool = True

    def describe(self) -> str:
        """Return the form in words.

        Example:
            >>> Int4Form().describe()
            'INT4 (groups of 128, symmetric)'
        """
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"INT4 (groups of {self.group_size}, {kind})"

    def weight(self, parts: Mapping[str, Tensor]) -> PackedWeight:
        """Return a matrix from its tensors, checked.

        Args:
            parts: the tensors by the end of their keys: packed, scale, shape, and zero_point if the
                form is asymmetric.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: a tensor is missing, is not of the form, or has the wrong shape.
        """
        expected = {"packed", "scale", "shape"} | (set() if self.symmetric else {"zero_point"})
        for part in sorted(parts.keys() ^ expected):
            state = "is missing" if part in expected else f"is no part of {self.describe()}"
            raise ValueError(f"weight_{part} {state}")
        shape = parts["shape"]
        if shape.dtype != torch.int64 or shape.shape != (2,):
            got = f"{str(shape.dtype).removeprefix('torch.')} {list(shape.shape)}"
            raise ValueError(f"weight_shape must be int64 [2], got {got}")
        rows, columns = shape.tolist()
        return PackedWeight(
            parts["packed"],
            parts["scale"],
            shape=(rows, columns),
            zero_point=parts.get("zero_point"),
            group_size=columns if columns <= self.group_size else self.group_size,
        )


def int4_config(config: Mapping[str, Any], form: Int4Form) -> dict[str, Any]:
    """Return the config of an adapter whose pairs are stored in INT4.

    Args:
        config: the config of the adapter in floats.
        form: how its matrices are quantised.

    Example:
        >>> config = int4_config({"peft_type": "LORA", "r": 16}, Int4Form())
        >>> config["peft_type"], config["quantization_config"]["num_bits"]
        ('LORA_INT4', 4)
    """
    record = {**FIXED, "group_size": form.group_size, "symmetric": form.symmetric}
    return {**config, "peft_type": PEFT_TYPE, RECORD: record}


def is_int4(folder: str | os.PathLike[str]) -> bool:
    """Return whether a local folder holds an adapter whose config says INT4.

    False, too, for what is no such folder or has no readable config.
    """
    file = Path(folder) / CONFIG_FILE
    try:
        return file.is_file() and read_json_object(file).get("peft_type") == PEFT_TYPE
    except (OSError, ValueError):
        return False


def form_and_plain_config(
    file: Path, config: Mapping[str, Any]
) -> tuple[Int4Form | None, dict[str, Any]]:
    """Return how an adapter is stored, None for floats, and its config without what says so.

    Args:
        file: adapter_config.json, for the messages.
        config: its content.

    Raises:
        ValueError: the config says INT4, and its ``quantization_config`` is not of this form.
    """
    if config.get("peft_type") != PEFT_TYPE:
        return None, dict(config)
    record = config.get(RECORD)
    if not isinstance(record, dict):
        raise ValueError(f"{file}: {RECORD} must be an object for {PEFT_TYPE}, got {record!r}")
    for name, value in FIXED.items():
        if record.get(name) != value:
            raise ValueError(f"{file}: {RECORD}.{name} must be {value!r}, got {record.get(name)!r}")
    size, symmetric = record.get("group_size"), record.get("symmetric")
    if type(size) is not int or size < 1:
        raise ValueError(f"{file}: {RECORD}.group_size must be a positive int, got {size!r}")
    if type(symmetric) is not bool:
        raise ValueError(f"{file}: {RECORD}.symmetric must be true or false, got {symmetric!r}")
    plain = {name: value for name, value in config.items() if name != RECORD}
    return Int4Form(size, symmetric), {**plain, "peft_type": "LORA"}


def int4_tensors(tensors: Mapping[str, Tensor], form: Int4Form) -> dict[str, Tensor]:
    """Return the tensors of an adapter with lora_A and lora_B in INT4; the others stay.

    Args:
        tensors: the tensors of an adapter in floats, by key.
        form: how the matrices are quantised; the scales have the dtype of the matrix, or float32
            for float64.

    Raises:
        TypeError: a matrix is not float.
        ValueError: a matrix is not 2-D, its columns are not a multiple of the group size, or a
            value is not finite; the message names the key.

    Example:
        >>> tensors = {"q_proj.lora_A.weight": torch.ones(2, 8)}
        >>> sorted(int4_tensors(tensors, Int4Form()))[0]
        'q_proj.lora_A.weight_packed'
    """
    stored = {}
    for key, tensor in tensors.items():
        if not QUANTIZED_MATRIX.fullmatch(key):
            stored[key] = tensor
            continue
        if tensor.ndim != 2:
            raise ValueError(f"{key} must be a matrix, got {list(tensor.shape)}")
        weight = quantize_lora_matrix(key, tensor, form.group_size, symmetric=form.symmetric)
        stored[f"{key}_packed"] = weight.packed
        stored[f"{key}_scale"] = weight.scale
        stored[f"{key}_shape"] = torch.tensor(weight.shape)
        if weight.zero_point is not None:
            stored[f"{key}_zero_point"] = weight.zero_point
    return stored
