"""A dense checkpoint of a quantised one.

Source: ``docs/commands/unpack.md``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.integration.checkpoint.safetensors_files import DTYPES
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.conversion.convert import Conversion, Outcome, Settings, convert
from int4_lora.integration.conversion.deltas import Delta
from int4_lora.integration.conversion.dense_config import dense_config
from int4_lora.integration.conversion.dense_modules import DenseModule, MergedTensor, OtherFormat
from int4_lora.integration.conversion.row_blocks import check_packed
from int4_lora.integration.conversion.tasks import Copy, Task

__all__ = [
    "DTYPES_OF_DENSE",
    "check_dense_dtype",
    "dense_tasks",
    "plain_task",
    "plan_unpack",
    "unpack_checkpoint",
]

DTYPES_OF_DENSE = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
OF_A_MODULE = (  # tensors of a quantised module that say how it, or what it meets, is quantised
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "weight_shape",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
)
OF_A_CACHE = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")
SHAPES = {  # of a weight, from the tensor that holds its codes
    "float-quantized": ("weight", 1),
    "int-quantized": ("weight", 1),
    "naive-quantized": ("weight", 1),
    "mxfp4-pack-quantized": ("weight_packed", 2),
    "mxfp8-quantized": ("weight", 1),
    "nvfp4-pack-quantized": ("weight_packed", 2),
}


def unpack_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    settings: Settings | None = None,
) -> Outcome:
    """Write a dense checkpoint, bit for bit what the quantised one stands for.

    Args:
        source: a checkpoint's folder, or its name on the hub.
        target: the folder to make.
        dtype: float16, bfloat16 or float32, of every floating tensor; by default each module has
            the dtype of its scales, and other tensors their own.
        settings: how it is run.

    Returns:
        What was done.

    Raises:
        ImportError: compressed-tensors is not installed.
        OSError: the source is not there, or the target cannot be written.
        TypeError: a tensor of the wrong dtype.
        ValueError: a module that cannot be unpacked; the message names it.

    Example:
        >>> unpack_checkpoint("llama-w4a16", "llama-dense")  # doctest: +SKIP

    Source:
        ``docs/commands/unpack.md``.
    """
    plan = plan_unpack(open_checkpoint(source), dtype)
    return convert(plan, Path(target), settings or Settings())


def plan_unpack(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Conversion:
    """Return what ``unpack_checkpoint`` does; the headers are read, and everything is checked.

    Args:
        checkpoint: an open checkpoint.
        dtype: as there.
    """
    check_dense_dtype(dtype)
    return Conversion(
        source=checkpoint.path,
        others=(),
        tasks=tuple(dense_tasks(checkpoint, dtype, {})),
        config=dense_config(checkpoint.config, dtype),
    )


def check_dense_dtype(dtype: torch.dtype | None) -> None:
    """Check that a dense checkpoint may have a dtype.

    Raises:
        ValueError: it may not.
    """
    if dtype is not None and dtype not in DTYPES_OF_DENSE.values():
        raise ValueError(f"dtype must be float16, bfloat16, float32 or None, got {dtype!r}")


def dense_tasks(
    checkpoint: Checkpoint, dtype: torch.dtype | None, deltas: Mapping[str, Sequence[Delta]]
) -> list[Task]:
    """Return what makes every tensor of a dense checkpoint, in the order of the source.

    Args:
        checkpoint: an open checkpoint.
        dtype: of floating tensors, or None.
        deltas: what adapters add, by module.

    Raises:
        TypeError: a tensor of the wrong dtype.
        ValueError: a module that cannot be made dense.
    """
    tasks: list[Task] = []
    modules = {f"{name}.{part}": name for name in checkpoint.modules() for part in OF_A_MODULE}
    begun: set[str] = set()
    cache = checkpoint.quantization.get("kv_cache_scheme") is not None
    for full, stored in checkpoint.tensors.items():
        name = modules.get(full)
        if name is None and not (cache and full.endswith(OF_A_CACHE)):
            tasks.append(plain_task(full, stored, dtype, deltas))
        elif name is not None and name not in begun:
            begun.add(name)
            tasks.append(_dense_module(checkpoint, name, dtype, deltas.get(name, ())))
    return tasks


def plain_task(
    full: str,
    stored: StoredTensor,
    dtype: torch.dtype | None,
    deltas: Mapping[str, Sequence[Delta]],
) -> Task:
    """Return what makes a tensor that is no part of a quantised module.

    Args:
        full: its name.
        stored: where it is.
        dtype: of floating tensors, or None.
        deltas: what adapters add, by module.
    """
    own = deltas.get(full.removesuffix(".weight")) if full.endswith(".weight") else None
    return MergedTensor(full, stored, dtype, own) if own else Copy(full, stored, dtype)


def _dense_module(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype | None, deltas: Sequence[Delta]
) -> Task:
    if checkpoint.is_packed(name):
        check_packed(checkpoint, name)
        return DenseModule(checkpoint, name, dtype, deltas)
    form = checkpoint.schemes[name].format
    if form not in SHAPES:
        raise ValueError(f"{checkpoint.path}: {name}: {form} cannot be unpacked")
    part, codes = SHAPES[form]
    stored = checkpoint.tensors.get(f"{name}.{part}")
    if stored is None or len(stored.shape) != 2:
        raise ValueError(f"{checkpoint.path}: {name}: {part} of a {form} module must be a matrix")
    scale = checkpoint.tensors.get(f"{name}.weight_scale")
    if scale is None:
        raise ValueError(f"{checkpoint.path}: {name}: weight_scale of a {form} module is missing")
    if dtype is None:  # that of the scales where they are floats that a dense weight may have
        own = DTYPES.get(scale.dtype, torch.bfloat16)
        dtype = own if own in DTYPES_OF_DENSE.values() else torch.bfloat16
    shape = (stored.shape[0], stored.shape[1] * codes)
    return OtherFormat(checkpoint, name, shape, dtype)
