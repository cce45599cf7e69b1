"""The experts of a checkpoint, which stores gate, up and down of each as modules of their own.

``owner.<expert>.gate_proj``, ``up_proj`` and ``down_proj``, or w1, w3 and w2 as in Mixtral's files.
``ExpertsWeight`` has the rows of gate and of up in one weight, which ``join_rows`` makes and
``PackedWeight.rows`` takes apart.

Source: ``docs/format.md``; ``conversion_mapping.py`` of transformers 5 for the names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.reference import ExpertsWeight, PackedWeight, pack, unpack

__all__ = ["ExpertNames", "experts_of", "experts_weight", "join_rows", "stored_experts"]

PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
MODULE = re.compile(
    r"(?P<owner>.+)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)"
)


@dataclass(frozen=True)
class ExpertNames:
    """The names of the modules of one layer's experts.

    Args:
        owner: the module that holds the experts, such as ``model.layers.0.mlp.experts``.
        count: the number of experts.
        parts: the names of gate, up and down of an expert.
    """

    owner: str
    count: int
    parts: tuple[str, str, str]

    def of(self, expert: int) -> tuple[str, str, str]:
        """Return the full names of gate, up and down of an expert."""
        gate, up, down = (f"{self.owner}.{expert}.{part}" for part in self.parts)
        return gate, up, down

    def all(self) -> list[str]:
        """Return the full names of all modules, expert by expert."""
        return [name for expert in range(self.count) for name in self.of(expert)]


def stored_experts(modules: Iterable[str]) -> dict[str, ExpertNames]:
    """Return the experts among the names of modules, by the module that holds them.

    Args:
        modules: names of modules, such as ``Checkpoint.modules()``.

    Raises:
        ValueError: an expert lacks a projection that others have, or has one by two names; the
            message names it.

    Example:
        >>> names = [f"mlp.experts.0.{part}_proj" for part in ("gate", "up", "down")]
        >>> stored_experts([*names, "q_proj"])["mlp.experts"].parts
        ('gate_proj', 'up_proj', 'down_proj')
    """
    return {owner: _names(owner, names) for owner, names in experts_of(modules).items()}


def experts_of(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of experts' modules among others, by the module that holds the experts.

    Args:
        modules: names of modules.

    Example:
        >>> experts_of(["q_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj"])
        {'mlp.experts': ['mlp.experts.0.up_proj', 'mlp.experts.1.up_proj']}
    """
    found: dict[str, list[str]] = {}
    for name in modules:
        if match := MODULE.fullmatch(name):
            found.setdefault(match["owner"], []).append(name)
    return found


def experts_weight(checkpoint: Checkpoint, names: ExpertNames) -> ExpertsWeight:
    """Read the experts of one layer; gate and up of each become one weight.

    Args:
        checkpoint: an open checkpoint.
        names: the experts, from ``stored_experts(checkpoint.modules())``.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a module cannot be read, gate and up of an expert cannot be joined, or experts
            differ in their formats; the message names module or expert, and the rule.

    Example:
        >>> checkpoint = open_checkpoint("my-moe-W4A16")  # doctest: +SKIP
        >>> layers = stored_experts(checkpoint.modules())  # doctest: +SKIP
        >>> experts_weight(checkpoint, layers["model.layers.0.mlp.experts"])  # doctest: +SKIP

    Source:
        ``docs/format.md``.
    """
    gate_ups, downs = [], []
    for expert in range(names.count):
        gate, up, down = (checkpoint.packed_weight(name) for name in names.of(expert))
        try:
            gate_ups.append(join_rows(gate, up))
        except ValueError as error:
            raise ValueError(f"{checkpoint.path}: {names.owner}.{expert}: {error}") from error
        downs.append(down)
    try:
        return ExpertsWeight(gate_ups, downs)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {names.owner}: {error}") from error


def join_rows(first: PackedWeight, second: PackedWeight) -> PackedWeight:
    """Return a weight with the rows of one weight, then those of another.

    One scale for a tensor becomes a scale for each row, unless both weights have the same.

    Args:
        first: a weight.
        second: a weight of the same format and the same number of columns.

    Raises:
        ValueError: the weights differ in their columns, format, groups or ``g_idx``, or the rows of
            the first do not fill its last block; the message names the field and both values.

    Example:
        >>> from int4_lora.reference import quantize
        >>> gate, up = (quantize(torch.full((3, 8), v), group_size=8) for v in (1.0, 2.0))
        >>> join_rows(gate, up).shape
        (6, 8)
    """
    one_scale = first.strategy == second.strategy == "tensor"
    if one_scale and not _same_scale(first, second):
        first, second = _scale_for_each_row(first), _scale_for_each_row(second)
    _check_joinable(first, second)
    scale, zero_point = first.scale, first.zero_point
    if first.strategy != "tensor":
        scale = torch.cat([first.scale, second.scale])
        zero_point = _joined_zero_points(first, second)
    return PackedWeight(
        packed=torch.cat([first.packed, second.packed]),
        scale=scale,
        shape=(first.out_features + second.out_features, first.in_features),
        zero_point=zero_point,
        g_idx=first.g_idx,
        group_size=first.group_size,
        bits=first.bits,
    )


def _names(owner: str, modules: Iterable[str]) -> ExpertNames:
    """Return the names of the experts of one module; each must have all three projections."""
    matches = (MODULE.fullmatch(name) for name in modules)
    entries = {(int(match["expert"]), match["part"]) for match in matches if match}
    count = 1 + max(expert for expert, _ in entries)
    present = {part for _, part in entries}
    for parts in PARTS:
        if present <= {*parts}:
            break
    else:
        raise ValueError(
            f"{owner}: experts must have {', '.join(PARTS[0])} or {', '.join(PARTS[1])}, "
            f"got {', '.join(sorted(present))}"
        )
    for expert in range(count):
        for part in parts:
            if (expert, part) not in entries:
                raise ValueError(f"{owner}: expert {expert} of {count} has no quantised {part}")
    return ExpertNames(owner, count, parts)


def _same_scale(first: PackedWeight, second: PackedWeight) -> bool:
    """Return whether two weights of one scale each have the same scale and zero-point."""
    if first.symmetric != second.symmetric or first.scale.dtype != second.scale.dtype:
        return False
    if first.zero_point is not None and second.zero_point is not None:
        same = torch.equal(first.zero_point, second.zero_point)
    else:
        same = True
    return same and torch.equal(first.scale, second.scale)


def _scale_for_each_row(weight: PackedWeight) -> PackedWeight:
    """Return a weight of one scale as the same weight with a scale for each row."""
    zero_point = weight.zero_point
    if zero_point is not None:
        rows = zero_point.view(1, 1).expand(weight.out_features, 1).contiguous()
        zero_point = pack(rows, bits=weight.bits, dim=0)
    scale = weight.scale.view(1, 1).expand(weight.out_features, 1).contiguous()
    return PackedWeight(weight.packed, scale, weight.shape, zero_point, bits=weight.bits)


def _check_joinable(first: PackedWeight, second: PackedWeight) -> None:
    for name in ("in_features", "bits", "strategy", "group_size", "symmetric"):
        values = (getattr(first, name), getattr(second, name))
        if values[0] != values[1]:
            raise ValueError(f"{name} of both weights must be equal, got {values[0]}, {values[1]}")
    if first.scale.dtype != second.scale.dtype:
        dtypes = f"{first.scale.dtype}, {second.scale.dtype}"
        raise ValueError(f"scales of both weights must have one dtype, got {dtypes}")
    if first.scale.shape[1:] != second.scale.shape[1:]:
        shapes = f"{list(first.scale.shape)}, {list(second.scale.shape)}"
        raise ValueError(f"scales of both weights must have the same groups, got {shapes}")
    if (first.g_idx is None) != (second.g_idx is None) or (
        first.g_idx is not None
        and second.g_idx is not None
        and not torch.equal(first.g_idx, second.g_idx)
    ):
        raise ValueError("g_idx of both weights must be equal, got two orders of columns")
    if isinstance(first.group_size, tuple) and first.out_features % first.group_size[0]:
        raise ValueError(
            f"rows of the first weight must fill its blocks of {first.group_size[0]} rows, "
            f"got {first.out_features}"
        )


def _joined_zero_points(first: PackedWeight, second: PackedWeight) -> torch.Tensor | None:
    """Return the zero-points of both; those packed along the rows are packed again."""
    if first.zero_point is None or second.zero_point is None:
        return None
    if first.strategy == "block":
        return torch.cat([first.zero_point, second.zero_point])
    rows = [
        unpack(weight.zero_point, weight.out_features, bits=weight.bits, dim=0)
        for weight in (first, second)
        if weight.zero_point is not None
    ]
    return pack(torch.cat(rows), bits=first.bits, dim=0)
