"""Which modules of a model can stay packed, and why the others cannot.

Source: ``compressed_tensors.quantization``: a quantised module has a ``quantization_scheme``; as
long as it is compressed it has ``weight_packed`` in place of ``weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from int4_lora.integration.checkpoint.experts import experts_of
from int4_lora.integration.checkpoint.layouts import INT_QUANTIZED
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.huggingface.fused_experts import FusedExperts

__all__ = ["Findings", "describe", "quantised_modules", "sort_modules"]

DENSE = "its weight is dense already"
ABSENT = "the checkpoint has no quantised module of this name"
FUSED = "the model has no such module: transformers makes the experts dense and fuses them"
MISSING = "the model has no such module"


@dataclass(frozen=True)
class Findings:
    """The quantised modules of a model.

    Args:
        packed: the checkpoint's name of each module that can stay packed, by its name here.
        dense: the modules that the checkpoint stores packed, and whose weight is dense here.
        offloaded: the modules whose tensors are not on a device.
        left: why each of the other modules stays as it is.
    """

    packed: dict[str, str] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    offloaded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def quantised_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose weights compressed-tensors quantised, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(getattr(module, "quantization_scheme", None), "weights", None) is not None
    }


def sort_modules(
    found: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    experts: Iterable[FusedExperts] = (),
    refused: Mapping[str, str] | None = None,
) -> Findings:
    """Return what can be done with each quantised module that is no expert.

    Args:
        found: returned by ``quantised_modules``.
        checkpoint: the checkpoint of the model.
        experts: the experts that stay packed.
        refused: why other experts do not, by the module that holds them.
    """
    findings, seen = Findings(), {name for layer in experts for name in layer.names.all()}
    reasons = {
        name: (refused or {}).get(owner, FUSED)
        for owner, names in experts_of(checkpoint.modules()).items()
        for name in names
    }
    for name, module in found.items():
        stored = checkpoint.spelling_of(name)
        if stored is None:
            findings.left[name] = ABSENT
            continue
        seen.add(stored)
        reason = _refusal(module, checkpoint, stored)
        if reason is not None:
            findings.left[name] = reason
        elif "weight_packed" not in module._parameters:
            findings.dense.append(name)
        elif any(tensor.is_meta for tensor in module.parameters(recurse=False)):
            findings.offloaded.append(name)
        else:
            findings.packed[name] = stored
    for stored in checkpoint.modules():
        if stored not in seen:
            findings.left[stored] = reasons.get(stored, MISSING)
    return findings


def _refusal(module: nn.Module, checkpoint: Checkpoint, stored: str) -> str | None:
    """Return why a module cannot stay packed, or None if it can."""
    scheme = checkpoint.schemes[stored]
    packed = checkpoint.is_packed(stored) or checkpoint.is_float4(stored)
    if not packed or checkpoint.layout(stored) is INT_QUANTIZED:
        return f"its format is {scheme.format} ({scheme.kind}, {scheme.bits} bits)"
    if scheme.activations:
        return "its activations are quantised, too"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, and only torch.nn.Linear can stay packed"
    return None


def describe(reasons: Mapping[str, str]) -> str:
    """Return a line for each kind of module and reason; numbers in names become ``*``.

    Example:
        >>> describe({"layers.0.up": "it is FP8", "layers.1.up": "it is FP8"})
        '  layers.*.up (2 modules): it is FP8'
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault((re.sub(r"\b\d+\b", "*", name), reason), []).append(name)
    return "\n".join(
        f"  {kind} ({len(names)} modules): {reason}" if names[1:] else f"  {names[0]}: {reason}"
        for (kind, reason), names in kinds.items()
    )
