"""Make transformers save dense experts as what they are.

transformers 5 fuses the experts of a layer when it loads a model. To save it, it reverts each step
of the loading. For INT4 experts the first step is to dequantise, which has no reverse, so
``save_pretrained`` raises an error, also when nothing of the model is quantised any more. Experts
that stayed packed were not fused at all, so that nothing takes them apart once they are dense.

Source: ``CompressedTensorsHfQuantizer.update_weight_conversions`` and ``revert_weight_conversion``
of transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["dense_conversions", "of_dense_experts", "without_decompression"]

STEPS = ("DecompressExperts", "CompressedTensorsDequantize")  # the latter from 5.22 on
PARTS = re.compile(r"\.weight(_\w+)?\$?$")  # patterns of weight_packed and of what lies beside it


def without_decompression(conversion: Any) -> Any:
    """Return a conversion whose checkpoint has dense experts in place of packed ones.

    Args:
        conversion: a ``WeightConverter`` or a ``WeightRenaming`` of transformers.

    Returns:
        The same conversion, if it does not decompress experts.
    """
    steps = getattr(conversion, "operations", ())
    kept = [step for step in steps if type(step).__name__ not in STEPS]
    if len(kept) == len(steps):
        return conversion
    sources = (PARTS.sub(".weight", pattern) for pattern in conversion._original_source_patterns)
    dense = type(conversion)(
        source_patterns=list(dict.fromkeys(sources)),
        target_patterns=conversion._original_target_patterns,
        operations=kept,
    )
    for name in ("scope_prefix", "base_model_prefix"):
        setattr(dense, name, getattr(conversion, name))
    return dense


def dense_conversions(model: Any) -> None:
    """Make transformers take dense experts apart when it saves a model, and decompress none.

    Packed experts have the checkpoint's names already, which no conversion changes.

    Args:
        model: a model of transformers, of any version.
    """
    held = getattr(model, "_weight_conversions", None)
    if held is None:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = [without_decompression(conversion) for conversion in held]
    targets = {target for one in known for target in one._original_target_patterns}
    fusing: Any = get_model_conversion_mapping(model, add_legacy=False)
    known += [
        conversion
        for conversion in fusing
        if getattr(conversion, "operations", ())
        and any("experts" in source for source in conversion._original_source_patterns)
        and not targets & {*conversion._original_target_patterns}
    ]
    model.__dict__["_weight_conversions"] = known


def of_dense_experts(conversions: Iterable[Any]) -> list[Any]:
    """Return the conversions that fuse dense experts, for a checkpoint with packed layers.

    transformers replaces the names that they match by those of packed experts, and so would start
    the dense experts of such a checkpoint at random.

    Args:
        conversions: those of a model's class.
    """
    found = []
    for conversion in conversions:
        sources = getattr(conversion, "_original_source_patterns", ())
        if not getattr(conversion, "operations", ()) or any("experts" not in s for s in sources):
            continue
        dense = type(conversion)(
            source_patterns=[f"{one}$" if one.endswith(".weight") else one for one in sources],
            target_patterns=conversion._original_target_patterns,
            operations=list(conversion.operations),
        )
        for name in ("scope_prefix", "base_model_prefix"):
            setattr(dense, name, getattr(conversion, name))
        found.append(dense)
    return found
