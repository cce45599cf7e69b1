"""What an adapter adds to a weight, some rows at a time.

delta = weight * scaling * B A

Source: arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.integration.adapter.read import Adapter, AdapterModule
from int4_lora.integration.checkpoint.open import Checkpoint

__all__ = ["Delta", "deltas_of"]


class Delta:
    """What one adapter adds to one weight.

    Args:
        module: its pair of matrices.
        weight: what the adapter as a whole is multiplied by.
    """

    def __init__(self, module: AdapterModule, weight: float) -> None:
        self.a, self.b = module.a, module.b  # [rank, in_features], [out_features, rank]
        self.scaling = module.scaling * weight

    @property
    def source(self) -> list[Any]:
        """What tells it from any other, as JSON."""
        digest = hashlib.sha256()
        for one in (self.a, self.b):
            digest.update(str(one.dtype).encode())
            digest.update(one.contiguous().view(torch.uint8).numpy().tobytes())
        return [digest.hexdigest(), self.scaling]

    def add_to(self, rows: Tensor, start: int) -> None:
        """Add it to some rows of the weight, in place.

        Args:
            rows: float64 ``[any, in_features]``.
            start: the first of them in the whole weight.
        """
        b = self.b[start : start + rows.shape[0]].to(torch.float64)
        rows += self.scaling * (b @ self.a.to(torch.float64))


def deltas_of(
    checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> dict[str, list[Delta]]:
    """Return what adapters add to each module, by the module's name.

    Args:
        checkpoint: the base.
        adapters: adapters, and what each is multiplied by.

    Raises:
        ValueError: a module that the base does not have, has in another format or in another
            shape, or an adapter that is not finite; the message names adapter and module.
    """
    found: dict[str, list[Delta]] = {}
    for adapter, weight in adapters:
        for name, module in adapter.modules.items():
            where = f"{adapter.path}: {name}"
            rows, columns = _shape_in_base(checkpoint, name, where)
            shape = (module.b.shape[0], module.a.shape[1])
            if shape != (rows, columns):
                raise ValueError(
                    f"{where}: the adapter is for a weight of {list(shape)}, "
                    f"the base has [{rows}, {columns}]"
                )
            for matrix, values in (("lora_A", module.a), ("lora_B", module.b)):
                if not values.isfinite().all():
                    raise ValueError(f"{where}: {matrix} must be finite to be merged")
            found.setdefault(name, []).append(Delta(module, weight))
    return found


def _shape_in_base(checkpoint: Checkpoint, name: str, where: str) -> tuple[int, int]:
    """Return the shape of a module's weight."""
    if name in checkpoint.schemes:
        if not checkpoint.is_packed(name):
            form = checkpoint.schemes[name].format
            raise ValueError(
                f"{where}: it is {form} in {checkpoint.path}, which is not merged into"
            )
        return checkpoint.shape_of(name)
    stored = checkpoint.tensors.get(f"{name}.weight")
    if stored is None:
        tied = name.endswith("lm_head") and checkpoint.config.get("tie_word_embeddings") is True
        why = ": it is tied to the embeddings, which would change too" if tied else ""
        raise ValueError(f"{where}: {checkpoint.path} has no such weight{why}")
    if len(stored.shape) != 2 or stored.dtype not in ("F16", "BF16", "F32", "F64"):
        found = f"{stored.dtype} {list(stored.shape)}"
        raise ValueError(f"{where}: its weight must be a floating matrix, the base has {found}")
    return stored.shape[0], stored.shape[1]
