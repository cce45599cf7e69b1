"""The names of a quantised module's tensors in each layout that is read.

Source: ``docs/format.md``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from int4_lora.integration.checkpoint.scheme import PACKED_FORMAT

__all__ = [
    "AWQ",
    "FLOAT4",
    "GPTQ",
    "GPTQ_V2",
    "INT_QUANTIZED",
    "LAYOUTS",
    "PACK_QUANTIZED",
    "Layout",
]

GPTQ, GPTQ_V2, AWQ = "gptq", "gptq_v2", "awq"
UNPACKED_FORMATS = ("int-quantized", "naive-quantized")
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"


@dataclass(frozen=True)
class Layout:
    """The names of a module's tensors in one layout.

    Args:
        parts: the last parts of the names, the codes' first.
        codes: the part that holds the codes.
        scale: the part that holds the scales.
        g_idx: the part that holds the group of each column, or None.
        checked: the parts whose values may be wrong: no other values are read before a conversion.
        rows: whether the first dimension of the tensors is the outputs, so that rows can be read.
    """

    parts: tuple[str, ...]
    codes: str
    scale: str
    g_idx: str | None
    checked: tuple[str, ...]
    rows: bool


PACK_QUANTIZED = Layout(
    parts=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    codes="weight_packed",
    scale="weight_scale",
    g_idx="weight_g_idx",
    checked=("weight_g_idx",),
    rows=True,
)
INT_QUANTIZED = Layout(
    parts=("weight", "weight_scale", "weight_zero_point", "weight_g_idx"),
    codes="weight",
    scale="weight_scale",
    g_idx="weight_g_idx",
    checked=("weight_g_idx",),
    rows=True,
)
"""Codes and zero-points of one byte each, not packed."""
OF_GPTQ = Layout(
    parts=("qweight", "scales", "qzeros", "g_idx"),
    codes="qweight",
    scale="scales",
    g_idx="g_idx",
    checked=("qzeros", "g_idx"),
    rows=False,
)
OF_AWQ = Layout(
    parts=("qweight", "scales", "qzeros"),
    codes="qweight",
    scale="scales",
    g_idx=None,
    checked=("qzeros",),
    rows=False,
)
LAYOUTS = {
    PACKED_FORMAT: PACK_QUANTIZED,
    **dict.fromkeys(UNPACKED_FORMATS, INT_QUANTIZED),
    GPTQ: OF_GPTQ,
    GPTQ_V2: OF_GPTQ,
    AWQ: OF_AWQ,
}
"""The layouts that are read as a ``PackedWeight``, by the ``format`` of a scheme."""

OF_MXFP4 = Layout(
    parts=("weight_packed", "weight_scale"),
    codes="weight_packed",
    scale="weight_scale",
    g_idx=None,
    checked=(),
    rows=True,
)
OF_NVFP4 = dataclasses.replace(OF_MXFP4, parts=(*OF_MXFP4.parts, "weight_global_scale"))
FLOAT4 = {NVFP4: OF_NVFP4, MXFP4: OF_MXFP4}
"""The layouts that are read as a ``Float4Weight``, by the ``format`` of a scheme."""
