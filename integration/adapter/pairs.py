"""Read the two matrices of a pair from an adapter's file.

Source: ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import FLOATS
from int4_lora.integration.adapter.keys import KeyedTensor

__all__ = ["check_gathered", "read_pair", "where_of"]


def read_pair(name: str, pair: Mapping[str, KeyedTensor]) -> tuple[Tensor, Tensor]:
    """Read both matrices of a pair.

    Args:
        name: the module's name, for messages.
        pair: lora_A and lora_B, or lora_embedding_A and lora_embedding_B, under "A" and "B".

    Returns:
        Two float matrices of one dtype: where the stored dtypes differ, the smallest that
        represents both exactly.

    Raises:
        TypeError: a tensor is not float.
        ValueError: one is missing, is no matrix or is empty, or a file changed.
    """
    where = where_of(name, pair)
    kind = "lora_embedding" if ".lora_embedding_" in next(iter(pair.values())).key else "lora"
    if set(pair) != {"A", "B"}:
        missing = ({"A", "B"} - set(pair)).pop()
        raise ValueError(f"{where}: {kind}_{missing} is missing")
    a, b = pair["A"].read(), pair["B"].read()
    if a.dtype not in FLOATS or b.dtype not in FLOATS:
        dtypes = f"{a.dtype} and {b.dtype}".replace("torch.", "")
        raise TypeError(f"{where}: {kind}_A and {kind}_B must be float, got {dtypes}")
    for matrix, tensor in ((f"{kind}_A", a), (f"{kind}_B", b)):
        if tensor.ndim < 2:
            raise ValueError(f"{where}: {matrix} {_not_gathered(tensor)}")
        check_gathered(f"{where}: {matrix}", tensor)
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            f"{where}: {kind}_A and {kind}_B must be matrices, got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide), b.to(wide)


def where_of(name: str, pair: Mapping[str, KeyedTensor]) -> str:
    """Return the file and the module's name, for messages."""
    return f"{next(iter(pair.values())).stored.file}: {name}"


def check_gathered(where: str, tensor: Tensor) -> None:
    """Check that a tensor is not what is left where it is sharded among processes.

    Raises:
        ValueError: the tensor is empty; the message names the cause.
    """
    if 0 in tensor.shape:
        raise ValueError(f"{where} {_not_gathered(tensor)}")


def _not_gathered(tensor: Tensor) -> str:
    """Return why a trainer may have saved an empty or flat tensor, and what to do."""
    return (
        f"has the shape {list(tensor.shape)}: DeepSpeed ZeRO-3 and FSDP leave such tensors where a "
        "model is saved before its shards are gathered; save the adapter again within "
        "deepspeed.zero.GatheredParameters or FullyShardedDataParallel.summon_full_params"
    )
