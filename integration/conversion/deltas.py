"""Compute what adapters add to the weights of a checkpoint.

delta = weight * scaling * B A

Source: arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.adapter import Adapter, AdapterModule
from int4_lora.integration.adapter.shapes import check_shape
from int4_lora.integration.checkpoint.open import Checkpoint

__all__ = ["Delta", "deltas_of"]


class Delta:
    """What one adapter adds to one weight.

    Args:
        module: the adapter's pair of matrices for this weight.
        weight: the adapter's factor.
    """

    def __init__(self, module: AdapterModule, weight: float) -> None:
        self.a, self.b = module.a, module.b  # [rank, in_features], [out_features, rank]
        self.scaling = module.scaling * weight

    @property
    def source(self) -> list[Any]:
        """A digest of the matrices, and the factor, as JSON."""
        digest = hashlib.sha256()
        for matrix in (self.a, self.b):
            digest.update(str(matrix.dtype).encode())
            digest.update(matrix.contiguous().view(torch.uint8).numpy().tobytes())
        return [digest.hexdigest(), self.scaling]

    def add_to(self, rows: Tensor, start: int) -> None:
        """Add the delta to a block of rows of the weight, in place.

        Args:
            rows: float64 ``[any, in_features]``.
            start: the index of the block's first row in the whole weight.
        """
        b = self.b[start : start + rows.shape[0]].to(torch.float64)
        rows += self.scaling * (b @ self.a.to(torch.float64))


def deltas_of(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, list[Delta]]:
    """Return the deltas of each module, by the module's name.

    Args:
        checkpoint: the base.
        adapters: adapters and their factors.

    Raises:
        ValueError: the base lacks a module, or has it in another shape or in a format that cannot
            be merged into, or an adapter is not finite; the message names adapter and module.
    """
    deltas: dict[str, list[Delta]] = {}
    for adapter, weight in adapters:
        for name, module in adapter.modules.items():
            where = f"{adapter.path}: {name}"
            check_shape(adapter, name, *_shape_in_base(checkpoint, name, where))
            for matrix, values in (("lora_A", module.a), ("lora_B", module.b)):
                if not values.isfinite().all():
                    raise ValueError(f"{where}: {matrix} must be finite to be merged")
            deltas.setdefault(name, []).append(Delta(module, weight))
    return deltas


def _shape_in_base(checkpoint: Checkpoint, name: str, where: str) -> tuple[int, int]:
    """Return the shape of a module's weight in the base."""
    if name in checkpoint.schemes:
        if not checkpoint.is_packed(name):
            scheme = checkpoint.schemes[name]
            kind = f"{scheme.format} of {scheme.kind}, {scheme.bits} bits"
            raise ValueError(
                f"{where}: it is {kind}, in {checkpoint.path}, which is not merged into"
            )
        return checkpoint.shape_of(name)
    stored = checkpoint.tensors.get(f"{name}.weight")
    if stored is None:
        tied = name.endswith("lm_head") and checkpoint.config.get("tie_word_embeddings") is True
        why = ": it is tied to the embeddings, which would change too" if tied else ""
        raise ValueError(f"{where}: {checkpoint.path} has no such weight{why}")
    if len(stored.shape) != 2 or stored.dtype not in ("F16", "BF16", "F32", "F64"):
        actual = f"{stored.dtype} {list(stored.shape)}"
        raise ValueError(f"{where}: its weight must be a floating matrix, the base has {actual}")
    return stored.shape[0], stored.shape[1]
