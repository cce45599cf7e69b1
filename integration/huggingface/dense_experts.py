"""Make transformers save the experts that it made dense as what they are.

transformers 5 fuses the experts of a layer when it loads a model. To save it, it reverts each step
of the loading. For INT4 experts the first step is to dequantise, which has no reverse, so
``save_pretrained`` raises an error, also when nothing of the model is quantised any more.

Source: ``CompressedTensorsHfQuantizer.update_weight_conversions`` and ``revert_weight_conversion``
of transformers 5.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["without_decompression"]

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
