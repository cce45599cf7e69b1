"""The dense weight of a served layer: from our layout, or from the checkpoint's file again.

vLLM merges modules of the checkpoint into one layer (qkv_proj, gate_up_proj), takes them merged as
some checkpoints have them, renames them, and splits layers over ranks. What is read from the file
is merged and split in the same way.

Source: vLLM's ``MergedColumnParallelLinear``, ``QKVParallelLinear`` and ``RowParallelLinear``.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.open import Checkpoint, open_checkpoint
from int4_lora.reference import PackedWeight

__all__ = ["dense_weight", "packed_weight_of_checkpoint"]

PACK = 8  # codes to a word


def dense_weight(layer: Any, dtype: torch.dtype | None) -> Tensor:
    """Return the dense weight of one of vLLM's linear layers.

    Args:
        layer: the base layer, which has our scheme.
        dtype: of the result; None means the scales' dtype.

    Raises:
        ValueError: the checkpoint does not have the layer's modules.
    """
    served, engine = layer.int4_lora, layer.int4_lora.engine
    with torch.inference_mode(False), torch.no_grad():  # so that writes to it are counted
        packed = served.cached
        readable = served.shared if served.weight is None else served.weight
        if packed is None and readable is not None:
            packed = readable.packed_weight()
        elif packed is None:  # vLLM's kernel has destroyed the layout
            packed = packed_weight_of_checkpoint(layer).to(layer.weight_packed.device)
        dense: Tensor = engine.cache.get(packed, dtype)
    served.cached = packed  # the cache knows a weight by its identity
    for other in engine.layers:
        if other.cached is not None and other.cached not in engine.cache:
            other.cached = None
    return dense


def packed_weight_of_checkpoint(layer: Any) -> PackedWeight:
    """Read a layer's part of the checkpoint, merged and split as vLLM does.

    Args:
        layer: the base layer.

    Raises:
        ValueError: the checkpoint does not have the layer's modules.
    """
    checkpoint = open_checkpoint(layer.int4_lora.engine.checkpoint_folder())
    sizes = layer.output_partition_sizes
    shares = [
        _share_of_rank(layer, weight, size, part)
        for part, (weight, size) in enumerate(
            zip(_whole_modules(checkpoint, layer), sizes, strict=True)
        )
    ]
    return _concatenated(shares)


def _whole_modules(checkpoint: Checkpoint, layer: Any) -> list[PackedWeight]:
    """Return the weight of each part of a layer, of all ranks together.

    Raises:
        ValueError: the checkpoint does not have them, or not of the layer's shape.
    """
    name, engine = layer.int4_lora.name, layer.int4_lora.engine
    parent, dot, last = name.rpartition(".")
    parts = [f"{parent}{dot}{part}" for part in engine.packed_modules.get(last, [last])]
    stored = [checkpoint.spelling_of(part) for part in parts]
    if len(parts) == len(layer.output_partition_sizes) and None not in stored:
        return [checkpoint.packed_weight(module) for module in stored if module is not None]
    merged = checkpoint.spelling_of(name)
    if merged is None:
        missing = next(part for part, module in zip(parts, stored, strict=True) if module is None)
        raise ValueError(
            f"{checkpoint.path} has no module {missing}, which {name} would be made of"
        )
    weight = checkpoint.packed_weight(merged)
    stops = list(itertools.accumulate(_whole_sizes(layer)))
    if stops[-1] != weight.out_features:
        raise ValueError(
            f"{checkpoint.path}: {merged} has {weight.out_features} rows, and the layer {name} "
            f"{stops[-1]}"
        )
    return [weight.rows(slice(*rows)) for rows in itertools.pairwise([0, *stops])]


def _whole_sizes(layer: Any) -> list[int]:
    """Return the rows of each part of a layer, of all ranks together."""
    sizes = layer.output_partition_sizes
    return [
        size * layer.tp_size // (_replicas(layer) if part > 0 else 1)
        for part, size in enumerate(sizes)
    ]


def _replicas(layer: Any) -> int:
    """Return how many ranks share each key and value head."""
    return int(getattr(layer, "num_kv_head_replicas", 1))


def _share_of_rank(layer: Any, weight: PackedWeight, size: int, part: int) -> PackedWeight:
    """Return the rows and columns of a module that are on this rank.

    Args:
        layer: the base layer.
        weight: the whole module.
        size: how many rows are on this rank.
        part: the module's place among those the layer is merged of.
    """
    start = 0
    if size != weight.out_features:
        replicas = _replicas(layer) if part > 0 else 1
        start = (layer.tp_rank // replicas) * size
    return _columns_of_rank(layer, weight.rows(slice(start, start + size)))


def _columns_of_rank(layer: Any, weight: PackedWeight) -> PackedWeight:
    columns = layer.input_size_per_partition
    if columns == weight.in_features:
        return weight
    start, stop = layer.tp_rank * columns, (layer.tp_rank + 1) * columns
    packed = weight.packed[:, start // PACK : stop // PACK]
    scale, zero_point = weight.scale, weight.zero_point
    groups = scale.shape[1]
    if groups > 1:
        size = weight.in_features // groups
        scale = scale[:, start // size : stop // size]
        if zero_point is not None:
            zero_point = zero_point[:, start // size : stop // size]
    return PackedWeight(packed, scale, (weight.out_features, columns), zero_point)


def _concatenated(weights: list[PackedWeight]) -> PackedWeight:
    zero_points = [weight.zero_point for weight in weights if weight.zero_point is not None]
    return PackedWeight(
        torch.cat([weight.packed for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        (sum(weight.out_features for weight in weights), weights[0].in_features),
        torch.cat(zero_points) if zero_points else None,
    )
