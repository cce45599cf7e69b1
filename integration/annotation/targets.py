"""Find the modules of a checkpoint that adapters can target, and those to suggest.

Here, a module is INT4 if it is pack-quantized with 4 bits and its activations are not quantised:
vLLM's ``--quantization int4_lora`` computes these modules.

Source: ``docs/commands/annotate.md``; PEFT's ``target_modules``, which match the ends of names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.target_matching import ignored

__all__ = ["LoRATargets", "lora_targets"]

VOCABULARY = re.compile(r"(.*\.)?(\w*lm_head|wte|wpe|\w*embed\w*)")
EXPERT = re.compile(r"(^|\.)experts\.")
LAYER = re.compile(r"(^|\.)\d+\.")
ROUTER = re.compile(r"(\w*_)?(gate|router)")
SERVED_STRATEGIES = ("channel", "group")


@dataclass(frozen=True)
class LoRATargets:
    """The modules of a checkpoint that adapters can target.

    Args:
        compatible: whether vLLM with ``--quantization int4_lora`` takes adapters on INT4 layers.
        incompatible_because: the reasons why it does not, one sentence each.
        modules: the last parts of the names of INT4 modules other than the vocabulary's.
        suggested: the entries of ``modules`` that name only INT4 projections of layers.
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
    int4 = [name for name in checkpoint.modules() if _is_int4(checkpoint, name)]
    reasons = tuple(_reasons(checkpoint, int4))
    names = sorted({_last(name) for name in int4 if not VOCABULARY.fullmatch(name)})
    projections = {name for name in int4 if _is_projection(name)}
    unsuitable = {_last(name) for name in _linears(checkpoint) - projections}
    suggested = [name for name in names if name not in unsuitable and not ROUTER.fullmatch(name)]
    return LoRATargets(not reasons, reasons, tuple(names), tuple(suggested))


def _is_int4(checkpoint: Checkpoint, name: str) -> bool:
    scheme = checkpoint.schemes[name]
    return checkpoint.is_pack_quantized(name) and scheme.bits == 4 and not scheme.activations


def _is_projection(name: str) -> bool:
    """Return whether a module belongs to a numbered layer, but not to an expert or vocabulary."""
    return _served_alone(name) and LAYER.search(name) is not None


def _linears(checkpoint: Checkpoint) -> set[str]:
    """Return every module that has a weight, quantised or not."""
    dense = [
        name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith(".weight")
    ]
    return {*checkpoint.modules(), *dense}


def _reasons(checkpoint: Checkpoint, int4: Sequence[str]) -> list[str]:
    """Return the reasons why vLLM does not take adapters on the checkpoint's INT4 layers."""
    packed = [name for name in checkpoint.modules() if checkpoint.is_pack_quantized(name)]
    stray = {
        name
        for name in packed
        if f"{name}.weight_g_idx" in checkpoint.tensors and checkpoint.column_order(name)
    }
    ordered = {
        name
        for name in packed
        if checkpoint.schemes[name].actorder == "group"
        or f"{name}.weight_g_idx" in checkpoint.tensors
    }
    kinds = {
        "is ordered by activation, which vLLM refuses: quantise with actorder static or none": [
            name for name in packed if name in ordered - stray
        ],
        "stores a weight_g_idx in column order, which vLLM does not load: remove it, and actorder "
        "from config.json": [name for name in packed if name in stray],
        "is packed, but on the ignore list, so that vLLM expects it dense: take it off the list": (
            ignored(checkpoint.path / "config.json", checkpoint.quantization, packed)
        ),
        "is of a strategy that vLLM does not serve: quantise by channel or group": [
            name for name in packed if checkpoint.schemes[name].strategy not in SERVED_STRATEGIES
        ],
        "is quantised, and vLLM cannot put adapters beside it: add it to the ignore list": [
            name for name in checkpoint.modules() if VOCABULARY.fullmatch(name)
        ],
    }
    reasons = [] if any(map(_served_alone, int4)) else [_why_none(checkpoint, int4)]
    for reason, names in kinds.items():
        if names:
            others = f", and {len(names) - 1} more like it" if len(names) > 1 else ""
            reasons.append(f"{names[0]} {reason}{others}")
    return reasons


def _why_none(checkpoint: Checkpoint, int4: Sequence[str]) -> str:
    """Return why no INT4 layer takes adapters, with the first module that might have."""
    if int4:
        alone = "only experts or the vocabulary are INT4, and their adapters are not computed here"
        return f"{alone}: {int4[0]}"
    name = checkpoint.modules()[0]
    scheme = checkpoint.schemes[name]
    kind = f"{scheme.format} of {scheme.kind}, {scheme.bits} bits"
    also = ", with quantised activations" if scheme.activations else ""
    return f"no linear layer is pack-quantized INT4 alone: {name} is {kind}{also}"


def _served_alone(name: str) -> bool:
    """Return whether a module is a separate linear layer: not an expert, not the vocabulary."""
    return not VOCABULARY.fullmatch(name) and not EXPERT.search(name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
