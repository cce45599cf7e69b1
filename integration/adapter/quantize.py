"""Quantise an adapter's folder to INT4, with the error of each module, and the way back.

Source: ``docs/commands/adapter.md``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
from int4_lora.integration.adapter.files import CONFIG_FILE, adapter_folder, stored_tensors
from int4_lora.integration.adapter.int4_form import (
    QUANTIZED_MATRIX,
    Int4Form,
    form_and_plain_config,
    int4_config,
    int4_tensors,
)
from int4_lora.integration.adapter.keys import keyed_tensors
from int4_lora.integration.adapter.read import read_adapter
from int4_lora.integration.adapter.write import write_folder
from int4_lora.integration.checkpoint.json_files import read_json_object
from int4_lora.integration.checkpoint.safetensors_files import inside

__all__ = ["ModuleError", "QuantizedAdapter", "dequantize_adapter", "quantize_adapter"]


@dataclass(frozen=True)
class ModuleError:
    """What quantising the pair of one module lost.

    Args:
        module: the module's name in the base model.
        rank: the rank of the pair.
        a: the Frobenius norm of the change of A over that of A.
        b: the same of B.
        delta: the same of B A, which is what the adapter adds.
    """

    module: str
    rank: int
    a: float
    b: float
    delta: float


@dataclass(frozen=True)
class QuantizedAdapter:
    """What ``quantize_adapter`` wrote.

    Args:
        adapter: the adapter, read back.
        errors: the error of each module.
        nbytes_before: the bytes of all tensors of the adapter in floats.
        nbytes_after: the bytes of all tensors that were written.
    """

    adapter: Adapter
    errors: tuple[ModuleError, ...]
    nbytes_before: int
    nbytes_after: int


def quantize_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    group_size: int = 128,
    symmetric: bool = True,
) -> QuantizedAdapter:
    """Write an adapter with its A and B in INT4.

    The config keeps its options; pairs of embeddings and whole tensors are copied bit for bit.
    Other files of the folder are not copied.

    Args:
        source: the folder of an adapter in floats.
        target: the folder to write; it must not exist.
        group_size: columns of A or B that share a scale; a matrix with no more columns has one
            group per row.
        symmetric: whether all zero-points are 0.

    Returns:
        The adapter as it is read back, and the error of each module.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: ``source`` is no folder of an adapter.
        TypeError: a tensor has the wrong dtype, or an option the wrong type.
        ValueError: the adapter cannot be read, is INT4 already or has no lora_A and lora_B, or a
            matrix cannot be quantised in these groups; the message names file or key.

    Example:
        >>> import tempfile
        >>> from int4_lora.integration import write_adapter
        >>> q_proj = AdapterModule(torch.ones(2, 8), torch.ones(4, 2), scaling=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_adapter(f"{folder}/mine", {"model.q_proj": q_proj})
        ...     written = quantize_adapter(f"{folder}/mine", f"{folder}/mine-int4")
        >>> written.errors[0].module, round(written.errors[0].a, 3)
        ('model.q_proj', 0.067)

    Source:
        ``docs/commands/adapter.md``.
    """
    folder, form = adapter_folder(source), Int4Form(group_size, symmetric)
    if type(symmetric) is not bool:
        raise TypeError(f"symmetric must be a bool, got {type(symmetric).__name__}")
    config, tensors = _floats(folder, is_int4=False)
    if not any(map(QUANTIZED_MATRIX.fullmatch, tensors)):
        raise ValueError(f"{folder} holds no lora_A and lora_B to quantise")
    before = read_adapter(folder)
    try:
        packed = int4_tensors(tensors, form)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{folder}: {error}") from error
    after = write_folder(_new(target), int4_config(config, form), packed)
    errors = tuple(
        _error(name, before.modules[name], after.modules[name]) for name in after.modules
    )
    return QuantizedAdapter(after, errors, _nbytes(tensors), _nbytes(packed))


def dequantize_adapter(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Adapter:
    """Write an adapter in INT4 as one in floats, which PEFT and vLLM load.

    A and B are those that ``read_adapter`` reads, in the dtype of their scales; all else is as
    before it was quantised.

    Args:
        source: the folder of an adapter in INT4.
        target: the folder to write; it must not exist.

    Returns:
        The adapter, read back.

    Raises:
        FileExistsError: ``target`` exists.
        FileNotFoundError: ``source`` is no folder of an adapter.
        TypeError: a tensor has the wrong dtype.
        ValueError: the adapter cannot be read, or is not INT4.

    Example:
        >>> dequantize_adapter("sql-lora-int4", "sql-lora")  # doctest: +SKIP

    Source:
        ``docs/commands/adapter.md``.
    """
    folder = adapter_folder(source)
    config, tensors = _floats(folder, is_int4=True)
    read_adapter(folder)
    return write_folder(_new(target), config, tensors)


def _floats(folder: Path, *, is_int4: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of an adapter in floats, or of one in INT4 as if it were."""
    file = inside(folder, CONFIG_FILE)
    form, config = form_and_plain_config(file, read_json_object(file))
    if (form is not None) is not is_int4:
        stored = "floats" if form is None else form.describe()
        raise ValueError(f"{folder} is an adapter in {stored} already")
    keyed = keyed_tensors(stored_tensors(folder), form)
    return config, {tensor.key: tensor.read() for tensor in keyed}


def _new(target: str | os.PathLike[str]) -> Path:
    """Return the folder to write.

    Raises:
        FileExistsError: it exists.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there already")
    return Path(target)


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _error(name: str, before: AdapterModule, after: AdapterModule) -> ModuleError:
    """Return what a pair lost, in float64."""
    a, b, new_a, new_b = (
        matrix.to(torch.float64) for matrix in (before.a, before.b, after.a, after.b)
    )
    lost = _product_norm(torch.cat([new_b, -b], dim=1), torch.cat([new_a, a]))
    return ModuleError(
        module=name,
        rank=a.shape[0],
        a=_ratio(float((new_a - a).norm()), float(a.norm())),
        b=_ratio(float((new_b - b).norm()), float(b.norm())),
        delta=_ratio(lost, _product_norm(b, a)),
    )


def _product_norm(b: Tensor, a: Tensor) -> float:
    """Return the Frobenius norm of B A from two Gram matrices, without the product itself.

    ``|B A|^2 = sum((B^T B) * (A A^T))``. It is exact to some 1e-8 of |B| |A|.
    """
    squared = ((b.T @ b) * (a @ a.T)).sum()
    return float(squared.clamp(min=0).sqrt())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0 if part == 0 else float("inf")
