"""Find the modules of a checkpoint that adapters can target, and those to suggest.

Adapters can target a module that is pack-quantized, with 4 or 8 bits, and whose activations are not
quantised: vLLM's ``--quantization int4_lora`` adds them to these modules. On a GPU, vLLM's kernels
compute the base of 8 bits.

Source: ``docs/commands/annotate.md``; PEFT's ``target_modules``, which match the ends of names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.integration.adapter.fused_forms import PARTS
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.target_matching import ignored

__all__ = ["LoRATargets", "lora_targets"]

VOCABULARY = re.compile(r"(.*\.)?(\w*lm_head|wte|wpe|\w*embed\w*)")
HEAD = re.compile(r"(.*\.)?\w*lm_head")
EXPERT = re.compile(r"(^|\.)experts\.")
LAYER = re.compile(r"(^|\.)\d+\.")
ROUTER = re.compile(r"(\w*_)?(gate|router)")
SERVED_STRATEGIES = ("channel", "group")


@dataclass(frozen=True)
class LoRATargets:
    """The modules of a checkpoint that adapters can target.

    Args:
        compatible: whether vLLM with ``--quantization int4_lora`` takes adapters on packed layers.
        incompatible_because: the reasons why it does not, one sentence each.
        modules: the last parts of the names of packed modules other than the vocabulary's.
        suggested: the entries of ``modules`` that name only packed projections of layers.
    """

    compatible: bool
    incompatible_because: tuple[str, ...]
    modules: tuple[str, ...]
    suggested: tuple[str, ...]


def lora_targets(checkpoint: Checkpoint) -> LoRATargets:
    """Return the modules of a checkpoint that adapters can target.

    Args:
        checkpoint: an open checkpoint.

    Returns:
        The names, as PEFT matches them: ``q_proj`` means every module whose name ends so.

    Raises:
        ValueError: a ``weight_g_idx`` cannot be read.

    Example:
        >>> lora_targets(open_checkpoint("my-model-W4A16")).suggested  # doctest: +SKIP
        ('down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj')

    """
    packed = [name for name in checkpoint.modules() if _takes_adapters(checkpoint, name)]
    reasons = tuple(_reasons(checkpoint, packed))
    names = sorted({_last(name) for name in packed if not VOCABULARY.fullmatch(name)})
    projections = {name for name in packed if _is_projection(name)}
    unsuitable = {_last(name) for name in _linears(checkpoint) - projections}
    suggested = [name for name in names if name not in unsuitable and not ROUTER.fullmatch(name)]
    return LoRATargets(not reasons, reasons, tuple(names), tuple(suggested))


def _takes_adapters(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.is_pack_quantized(name) and not checkpoint.schemes[name].activations


def _is_projection(name: str) -> bool:
    """Return whether a module belongs to a numbered layer, but not to an expert or vocabulary."""
    return _served_alone(name) and LAYER.search(name) is not None


def _linears(checkpoint: Checkpoint) -> set[str]:
    """Return every module that has a weight, quantised or not."""
    dense = [
        name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")
    ]
    return {*checkpoint.modules(), *dense}


def _reasons(checkpoint: Checkpoint, targets: Sequence[str]) -> list[str]:
    """Return the reasons why vLLM does not take adapters on the checkpoint's packed layers."""
    packed = [name for name in checkpoint.modules() if checkpoint.is_pack_quantized(name)]
    kinds = {
        "stores a weight_g_idx, which vLLM does not load, since config.json gives no activation "
        "order: set actorder to group, or remove the tensor": [
            name
            for name in packed
            if f"{name}.weight_g_idx" in checkpoint.tensors
            and checkpoint.schemes[name].actorder != "group"
        ],
        "has another activation order than the modules that vLLM merges it with: quantise with "
        "actorder static or none": _of_another_order(checkpoint, packed),
        "is packed, but on the ignore list, so that vLLM expects it dense: take it off the list": (
            ignored(checkpoint.path / "config.json", checkpoint.quantization, packed)
        ),
        "is of a strategy that vLLM does not serve: quantise by channel or group": [
            name for name in packed if checkpoint.schemes[name].strategy not in SERVED_STRATEGIES
        ],
        "is quantised, and vLLM serves only a vocabulary whose lm_head alone is packed, in 4 bits, "
        "on all devices: add it to the ignore list": [
            name
            for name in checkpoint.modules()
            if VOCABULARY.fullmatch(name) and not _is_served_head(checkpoint, name)
        ],
    }
    reasons = [] if any(map(_served_alone, targets)) else [_why_none(checkpoint, targets)]
    for reason, names in kinds.items():
        if names:
            others = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
            reasons.append(f"{names[0]} {reason}{others}")
    return reasons


def _is_served_head(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether a module of the vocabulary is an lm_head that vLLM computes on all devices."""
    packed = checkpoint.is_pack_quantized(name) and checkpoint.schemes[name].bits == 4
    return packed and HEAD.fullmatch(name) is not None


def _of_another_order(checkpoint: Checkpoint, packed: Sequence[str]) -> list[str]:
    """Return the modules whose activation order is not that of the first part of a merged layer."""
    different, known = [], set(packed)
    for name in packed:
        prefix, last = name.rpartition(".")[0], _last(name)
        for parts in PARTS.values():
            first = f"{prefix}.{parts[0]}"
            if last in parts[1:] and first in known and not _same_order(checkpoint, first, name):
                different.append(name)
    return different


def _same_order(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Return whether two modules with the same inputs assign columns to groups alike."""
    one, other = _order(checkpoint, first), _order(checkpoint, second)
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _order(checkpoint: Checkpoint, name: str) -> Tensor | None:
    """Return the stored group of each column, or None for column order."""
    return None if checkpoint.column_order(name) else checkpoint.tensor(f"{name}.weight_g_idx")


def _why_none(checkpoint: Checkpoint, targets: Sequence[str]) -> str:
    """Return why no packed layer takes adapters, with the first module that might have."""
    if targets:
        alone = (
            "only experts or the vocabulary are packed, and their adapters are not computed here"
        )
        return f"{alone}: {targets[0]}"
    name = checkpoint.modules()[0]
    scheme = checkpoint.schemes[name]
    kind = f"{scheme.format} of {scheme.kind}, {scheme.bits} bits"
    also = ", with quantised activations" if scheme.activations else ""
    return f"no linear layer is pack-quantized in its weights alone: {name} is {kind}{also}"


def _served_alone(name: str) -> bool:
    """Return whether a module is a separate linear layer: not an expert, not the vocabulary."""
    return not VOCABULARY.fullmatch(name) and not EXPERT.search(name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
