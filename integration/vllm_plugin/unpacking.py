"""The dense weight of a served layer: from our layout, or read again where vLLM's kernel took it.

vLLM merges modules of the checkpoint into one layer (qkv_proj, gate_up_proj) and splits layers over
ranks; what is read again is merged and split in the same way.

Source: vLLM's ``MergedColumnParallelLinear``, ``QKVParallelLinear`` and ``RowParallelLinear``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.reference import PackedWeight

__all__ = ["read_again", "unpacked"]

PACK = 8  # codes to a word


def unpacked(layer: Any, dtype: torch.dtype | None) -> Tensor:
    """Return the dense weight of one of vLLM's linear layers.

    Args:
        layer: the base layer, which has our scheme.
        dtype: of the result; None means the scales' dtype.

    Raises:
        ValueError: the checkpoint, read again, does not have the layer's modules.
    """
    session, served = layer.int4_lora.session, layer.int4_lora
    with torch.inference_mode(False), torch.no_grad():  # so that writes to it are counted
        packed = session.packed.get(served.name)
        if packed is None and served.weight is not None:
            packed = served.weight.packed_weight()
        elif packed is None:
            device = layer.weight_packed.device
            packed = read_again(layer, session).to(device)
        dense: Tensor = session.cache.get(packed, dtype)
    session.packed[served.name] = packed  # the cache knows it by its identity
    for name in [name for name, one in session.packed.items() if one not in session.cache]:
        del session.packed[name]
    return dense


def read_again(layer: Any, session: Any) -> PackedWeight:
    """Read a layer's part of the checkpoint, merged and split as vLLM does.

    Args:
        layer: the base layer.
        session: knows the checkpoint's folder and which modules a layer is merged of.

    Raises:
        ValueError: the checkpoint does not have those modules.
    """
    name = layer.int4_lora.name
    checkpoint = open_checkpoint(session.folder())
    parent, _, last = name.rpartition(".")
    parts = session.packed_modules.get(last, [last])
    weights = [_module(checkpoint, f"{parent}.{part}" if parent else part, name) for part in parts]
    if len(weights) == 1 and len(layer.output_partition_sizes) == 1:
        rows = [_share(layer, weights[0].shape[0], layer.output_partition_sizes[0], 0)]
    else:
        sizes = zip(weights, layer.output_partition_sizes, strict=True)
        rows = [_share(layer, one.shape[0], size, part) for part, (one, size) in enumerate(sizes)]
    return _joined([_cut(one, own, layer) for one, own in zip(weights, rows, strict=True)])


def _module(checkpoint: Checkpoint, module: str, name: str) -> PackedWeight:
    if module not in checkpoint.schemes:
        raise ValueError(f"{checkpoint.path} has no module {module}, which {name} would be made of")
    return checkpoint.packed_weight(module)


def _share(layer: Any, whole: int, size: int, part: int) -> range:
    """Return which rows of a module are this rank's."""
    if size == whole:
        return range(whole)
    replicas = getattr(layer, "num_kv_head_replicas", 1) if part > 0 else 1
    first = (layer.tp_rank // replicas) * size
    return range(first, first + size)


def _cut(weight: PackedWeight, rows: range, layer: Any) -> PackedWeight:
    """Return some rows of a weight, and this rank's columns of it."""
    own = slice(rows.start, rows.stop)
    packed, scale, zero_point = weight.packed[own], weight.scale[own], weight.zero_point
    if zero_point is not None:
        zero_point = zero_point[rows.start // PACK : -(-rows.stop // PACK)]
    columns = layer.input_size_per_partition
    if columns != weight.shape[1]:
        first = layer.tp_rank * columns
        packed = packed[:, first // PACK : (first + columns) // PACK]
        groups = weight.scale.shape[1]
        if groups > 1:
            size = weight.shape[1] // groups
            own_groups = slice(first // size, (first + columns) // size)
            scale = scale[:, own_groups]
            zero_point = None if zero_point is None else zero_point[:, own_groups]
    return PackedWeight(packed, scale, (len(rows), columns), zero_point)


def _joined(weights: list[PackedWeight]) -> PackedWeight:
    first = weights[0]
    zero_points = [one.zero_point for one in weights if one.zero_point is not None]
    return PackedWeight(
        torch.cat([one.packed for one in weights]),
        torch.cat([one.scale for one in weights]),
        (sum(one.shape[0] for one in weights), first.shape[1]),
        torch.cat(zero_points) if zero_points else None,
    )
