"""Bring experts of Mixtral's family from transformers' names in memory to those in checkpoints.

===================================  =============================================
in memory, since transformers 5      in checkpoints
===================================  =============================================
``mlp.experts.<e>.gate_up_proj``     ``block_sparse_moe.experts.<e>.w1`` and ``.w3``
``mlp.experts.<e>.down_proj``        ``block_sparse_moe.experts.<e>.w2``
``mlp.gate``                         ``block_sparse_moe.gate``
===================================  =============================================

Source: "mixtral" in ``transformers/conversion_mapping.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from int4_lora.integration.adapter.adapter import AdapterModule
from int4_lora.integration.adapter.experts import DOWN, GATE_UP

__all__ = ["with_older_names"]

EXPERT = re.compile(rf"(?P<layer>.+\.)mlp\.experts\.(?P<expert>\d+)\.(?P<part>{GATE_UP}|{DOWN})")
ROUTER = re.compile(r"(?P<layer>.+\.)mlp\.gate")
MIXTURE = "block_sparse_moe"
NAMES = {GATE_UP: ("w1", "w3"), DOWN: ("w2",)}  # gate and up, the rows of one after the other's


def with_older_names(
    modules: Mapping[str, AdapterModule], base: Collection[str]
) -> tuple[dict[str, AdapterModule], tuple[str, ...]]:
    """Return an adapter's modules under the names of a checkpoint of Mixtral's family.

    Args:
        modules: the pairs of an adapter.
        base: the names of the checkpoint's modules. A module that it has is left alone, and so is
            one of which it has not the older name.

    Returns:
        The modules, and a note if any was renamed.

    Raises:
        ValueError: ``gate_up_proj`` has an odd number of rows.

    Example:
        >>> import torch
        >>> down = AdapterModule(torch.ones(1, 2), torch.ones(3, 1), 1.0)
        >>> base = {"layers.0.block_sparse_moe.experts.0.w2"}
        >>> [*with_older_names({"layers.0.mlp.experts.0.down_proj": down}, base)[0]]
        ['layers.0.block_sparse_moe.experts.0.w2']
    """
    found: dict[str, AdapterModule] = {}
    renamed = 0
    for name, module in modules.items():
        names = () if name in base else _older_names(name)
        if not names or not all(older in base for older in names):
            found[name] = module
            continue
        if module.b.shape[0] % len(names):
            raise ValueError(f"{name}: {module.b.shape[0]} rows cannot be split into {len(names)}")
        for older, b in zip(names, module.b.chunk(len(names)), strict=True):
            found[older] = AdapterModule(module.a, b, module.scaling)
        renamed += 1
    if not renamed:
        return found, ()
    return found, (
        f"mlp of transformers 5 taken for {MIXTURE}, {GATE_UP} for w1 and w3, {DOWN} for w2 "
        f"(x{renamed})",
    )


def _older_names(name: str) -> tuple[str, ...]:
    """Return the names in checkpoints of what is ``name`` in memory."""
    if match := EXPERT.fullmatch(name):
        owner = f"{match['layer']}{MIXTURE}.experts.{match['expert']}"
        return tuple(f"{owner}.{part}" for part in NAMES[match["part"]])
    if match := ROUTER.fullmatch(name):
        return (f"{match['layer']}{MIXTURE}.gate",)
    return ()
