"""Read the two matrices of a pair from an adapter's file.

Source: ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from int4_lora.integration.adapter.adapter import FLOATS
from int4_lora.integration.adapter.keys import KeyedTensor

__all__ = ["read_pair", "where_of"]


def read_pair(name: str, pair: Mapping[str, KeyedTensor]) -> tuple[Tensor, Tensor]:
    """Read both matrices of a pair.

    Args:
        name: the module's name, for messages.
        pair: the matrices under "A" and "B".

    Returns:
        Two float matrices of one dtype.

    Raises:
        TypeError: the tensors are not float, or their dtypes differ.
        ValueError: one is missing or is no matrix, or a file changed.
    """
    where = where_of(name, pair)
    if set(pair) != {"A", "B"}:
        missing = ({"A", "B"} - set(pair)).pop()
        raise ValueError(f"{where}: lora_{missing} is missing")
    a, b = pair["A"].read(), pair["B"].read()
    if a.dtype not in FLOATS or b.dtype != a.dtype:
        dtypes = f"{a.dtype} and {b.dtype}".replace("torch.", "")
        raise TypeError(f"{where}: lora_A and lora_B must be float of one dtype, got {dtypes}")
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(
            f"{where}: lora_A and lora_B must be matrices, got {list(a.shape)} and {list(b.shape)}"
        )
    return a, b


def where_of(name: str, pair: Mapping[str, KeyedTensor]) -> str:
    """Return the file and the module's name, for messages."""
    return f"{next(iter(pair.values())).stored.file}: {name}"
