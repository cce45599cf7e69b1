"""Unpack a quantised checkpoint to a dense checkpoint.

Source: ``docs/commands/unpack.md``; ``PretrainedConfig`` of transformers for config.json, whose
``torch_dtype`` became ``dtype``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from int4_lora.integration.checkpoint.compressed_tensors import module_tensors
from int4_lora.integration.checkpoint.open import Checkpoint, Unlisted, open_checkpoint
from int4_lora.integration.checkpoint.quantization_config import (
    ANNOTATIONS,
    CONFIG_KEYS,
    parts_of,
)
from int4_lora.integration.checkpoint.safetensors_files import DTYPES
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.conversion.accounting import check_accounted
from int4_lora.integration.conversion.changes import Changes
from int4_lora.integration.conversion.convert import Conversion, Outcome, Settings, convert
from int4_lora.integration.conversion.deltas import Change
from int4_lora.integration.conversion.dense_modules import (
    DecompressedModule,
    DenseModule,
)
from int4_lora.integration.conversion.float4_modules import Float4Module
from int4_lora.integration.conversion.row_blocks import check_packed
from int4_lora.integration.conversion.tasks import Task

__all__ = [
    "DENSE_DTYPES",
    "check_all_is_read",
    "plan_dense",
    "plan_unpack",
    "tasks_in_order",
    "unpack_checkpoint",
]

DENSE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
ACTIVATION_PARTS = (  # tensors that quantise a module's inputs and outputs
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
)
CACHE_PARTS = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")
CODES = {  # the tensor that holds the codes, and the number of codes in each of its elements
    "float-quantized": ("weight", 1),
    "int-quantized": ("weight", 1),
    "naive-quantized": ("weight", 1),
    "mxfp8-quantized": ("weight", 1),
}
UNREAD = (  # endings of codes and of their scales in layouts that are not read
    ("_packed", "_scale"),  # experts, as transformers names them in memory
    ("_blocks", "_scales"),  # MXFP4 experts of GPT-OSS
    (".qweight", ".scales"),  # GPTQ and AWQ
)
CONFIG_DTYPES = ("dtype", "torch_dtype")


def unpack_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    unlisted: Unlisted | None = None,
    settings: Settings | None = None,
) -> Outcome:
    """Write the dense checkpoint that a quantised checkpoint encodes, bit for bit.

    Args:
        source: a checkpoint's folder, or its name on the hub.
        target: the folder to write.
        dtype: float16, bfloat16 or float32, for every floating tensor; by default each module gets
            the dtype of its scales, and other tensors keep their dtype.
        unlisted: what to do with unlisted tensors, as in ``open_checkpoint``.
        settings: how to run the conversion.

    Returns:
        What was written.

    Raises:
        ImportError: a module needs compressed-tensors, and it is not installed.
        OSError: the source does not exist, or the target cannot be written.
        TypeError: a tensor has the wrong dtype.
        ValueError: a module cannot be unpacked, or tensors are unlisted; the message names them.

    Example:
        >>> unpack_checkpoint("llama-w4a16", "llama-dense")  # doctest: +SKIP
    """
    plan = plan_unpack(open_checkpoint(source, unlisted=unlisted), dtype)
    return convert(plan, Path(target), settings or Settings())


def plan_unpack(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Conversion:
    """Return the plan of ``unpack_checkpoint``, after checking every header."""
    return plan_dense(checkpoint, dtype, Changes())


def plan_dense(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    changes: Changes,
    others: tuple[Path, ...] = (),
) -> Conversion:
    """Return the plan of a dense checkpoint.

    Args:
        checkpoint: an open checkpoint.
        dtype: the dtype of floating tensors, or None.
        changes: what adapters change.
        others: the folders of the adapters.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a dense checkpoint cannot have ``dtype``, or a module cannot be unpacked.
    """
    if dtype is not None and dtype not in DENSE_DTYPES.values():
        raise ValueError(f"dtype must be float16, bfloat16, float32 or None, got {dtype!r}")
    checkpoint.check_listed()
    check_all_is_read(checkpoint)
    dropped = _dropped(checkpoint)
    tasks = tasks_in_order(
        {name: stored for name, stored in checkpoint.tensors.items() if name not in dropped},
        {
            full: name
            for name in checkpoint.modules()
            for full in (
                checkpoint.stored(name)
                if checkpoint.is_packed(name) or checkpoint.is_float4(name)
                else [f"{name}.{part}" for part in module_tensors(checkpoint, name)]
            )
        },
        lambda name: _dense_module(checkpoint, name, dtype, changes.modules.get(name, ())),
        lambda name, stored: changes.plain_task(name, stored, dtype),
    )
    tasks += changes.added_tasks(checkpoint, dtype)
    check_accounted(checkpoint.path, checkpoint.tensors, tasks, dropped)
    config = changes.config(_dense_config(checkpoint.config, dtype))
    reads = {stored.file.name for stored in checkpoint.tensors.values()}
    return Conversion(
        checkpoint.path,
        others,
        tasks,
        config,
        notes=checkpoint.left_behind,
        dropped=dropped,
        reads=reads,
    )


def _dropped(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensors that a dense checkpoint has no place for, and why."""
    has_cache = checkpoint.quantization.get("kv_cache_scheme") is not None
    activations = {
        f"{name}.{part}": "quantises the activations of a module"
        for name in checkpoint.modules()
        for part in ACTIVATION_PARTS
    }
    cache = {
        name: "quantises the KV cache"
        for name in checkpoint.tensors
        if has_cache and name.endswith(CACHE_PARTS)
    }
    return {name: why for name, why in (activations | cache).items() if name in checkpoint.tensors}


def tasks_in_order(
    tensors: Mapping[str, StoredTensor],
    module_of: Mapping[str, str],
    module_task: Callable[[str], Task],
    tensor_task: Callable[[str, StoredTensor], Task],
) -> tuple[Task, ...]:
    """Return the tasks that make a result, in the order of the source.

    Args:
        tensors: the source's tensors.
        module_of: the module of each tensor that a module's task replaces.
        module_task: makes the task of a module, which stands where its first tensor stood.
        tensor_task: makes the task of any other tensor.
    """
    tasks: list[Task] = []
    begun: set[str] = set()
    for name, stored in tensors.items():
        module = module_of.get(name)
        if module is None:
            tasks.append(tensor_task(name, stored))
        elif module not in begun:
            begun.add(module)
            tasks.append(module_task(module))
    return tuple(tasks)


def check_all_is_read(checkpoint: Checkpoint) -> None:
    """Refuse codes that belong to no module: copied, they would pass for dense values."""
    read = {full for name in checkpoint.modules() for full in checkpoint.stored(name)}
    for name, stored in checkpoint.tensors.items():
        if name in read or name.endswith(".weight_packed") or stored.dtype.startswith(("F", "BF")):
            continue
        for codes, scales in UNREAD:
            scale = name.removesuffix(codes) + scales
            if name.endswith(codes) and scale in checkpoint.tensors:
                raise ValueError(
                    f"{stored.file}: {name} is {stored.dtype} beside {scale}: quantised in a "
                    "layout that is not read, so that no dense weight can be made of it"
                )


def _dense_module(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype | None, deltas: Sequence[Change]
) -> Task:
    if checkpoint.is_packed(name):
        check_packed(checkpoint, name)
        return DenseModule(checkpoint, name, dtype, deltas)
    if checkpoint.is_float4(name):
        checkpoint.check(name)
        return Float4Module(checkpoint, name, dtype, deltas)
    scheme = checkpoint.schemes[name]
    form = scheme.format
    if form not in CODES:
        kind = f"{form} of {scheme.kind}, {scheme.bits} bits,"
        raise ValueError(f"{checkpoint.path}: {name}: {kind} cannot be unpacked")
    where = f"{checkpoint.path}: {name}"
    part, codes = CODES[form]
    both = {"weight", "weight_packed"} & set(checkpoint.parts[name])
    if len(both) > 1:
        raise ValueError(f"{where}: weight is stored beside weight_packed: one of them is unused")
    stored = checkpoint.tensors.get(f"{name}.{part}")
    if stored is None or len(stored.shape) != 2:
        raise ValueError(f"{where}: {part} of a {form} module must be a matrix")
    scale = checkpoint.tensors.get(f"{name}.weight_scale")
    if scale is None:
        raise ValueError(f"{where}: weight_scale of a {form} module is missing")
    if dtype is None:
        dtype = DTYPES.get(scale.dtype, torch.bfloat16)
        if dtype not in DENSE_DTYPES.values():  # scales may have dtypes that dense weights do not
            dtype = torch.bfloat16
    shape = (stored.shape[0], stored.shape[1] * codes)
    return DecompressedModule(checkpoint, name, shape, dtype)


def _dense_config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return config.json without the fields about quantisation, and with the new dtype."""
    dense = copy.deepcopy(dict(config))
    for path, part in list(parts_of(dense)):
        for key in CONFIG_KEYS:
            part.pop(key, None)
        if path.count(".") > 1:
            continue
        for key in ANNOTATIONS:
            part.pop(key, None)
        for key in CONFIG_DTYPES:
            if key in part and dtype is not None:
                part[key] = str(dtype).removeprefix("torch.")
    if dtype is not None and not any(key in dense for key in CONFIG_DTYPES):
        dense["torch_dtype"] = str(dtype).removeprefix("torch.")
    return dense
