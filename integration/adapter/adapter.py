"""What an adapter is: a pair of matrices for each layer, and tensors that it replaces.

Source: ``peft/tuners/lora/layer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FLOATS", "Adapter", "AdapterModule", "Replacement"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """The low-rank pair of one linear layer.

    Args:
        a: ``[rank, in_features]``, float.
        b: ``[out_features, rank]``, of the same dtype.
        scaling: alpha / rank, or alpha / sqrt(rank) with ``use_rslora``.
    """

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Replacement:
    """Values that replace a tensor of the base, or some of its rows.

    Args:
        tensor: the values, of the base tensor's shape; ``[rows, ...]`` if only rows are replaced.
        rows: int64 ``[rows]``, the rows that are replaced; None if all are.
        tied: whether a tensor that the base ties to this one changes with it. Not so for
            ``modules_to_save``: PEFT trains a copy of the module.
    """

    tensor: Tensor
    rows: Tensor | None = None
    tied: bool = True

    def describe(self, name: str) -> str:
        """Return that the tensor ``name`` is replaced, or how many of its rows are.

        Example:
            >>> Replacement(torch.ones(2, 8), rows=torch.tensor([3, 7])).describe("lm_head.weight")
            'rows of lm_head.weight are replaced: 2'
        """
        if self.rows is None:
            return f"{name} is replaced"
        return f"rows of {name} are replaced: {len(self.rows)}"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter of a model.

    Args:
        path: the adapter's folder.
        config: the content of ``adapter_config.json``.
        modules: the pair of each layer, by the layer's name in the base model.
        replacements: what replaces tensors of the base, by the tensor's full name there.
        notes: what was done to make the adapter fit, one sentence each.
    """

    path: Path
    config: Mapping[str, Any]
    modules: Mapping[str, AdapterModule]
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
