"""Put the stored tensors of an FP4 module together as one ``Float4Weight``.

Source: ``docs/format.md``, "FP4".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from int4_lora.integration.checkpoint.layouts import FLOAT4
from int4_lora.integration.checkpoint.scheme import Scheme
from int4_lora.reference import Float4Weight

__all__ = ["assemble_float4", "check_float4_parts"]


def check_float4_parts(scheme: Scheme, parts: Collection[str]) -> None:
    """Check which tensors of an FP4 module are stored, and what the config says of them.

    Args:
        scheme: how the module is quantised.
        parts: the last parts of the names of its tensors. Scales of activations are left alone.

    Raises:
        ValueError: a tensor is missing or is not of the format, or the config has other groups.
    """
    needed = FLOAT4[scheme.format].parts
    for part in needed:
        if part not in parts:
            raise ValueError(f"{part} of an {scheme.format} module is missing")
    for part in sorted(parts):
        if (part == "weight" or part.startswith("weight_")) and part not in needed:
            raise ValueError(f"{part} is stored, and {scheme.format} has none")
    size = 16 if scheme.format.startswith("nvfp4") else 32
    if not scheme.symmetric or scheme.group_size != size:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        raise ValueError(
            f"{scheme.format} is symmetric in groups of {size}, config.json says {kind} and "
            f"group_size {scheme.group_size}"
        )


def assemble_float4(scheme: Scheme, tensors: Mapping[str, Tensor]) -> Float4Weight:
    """Return the weight of an FP4 module, or of some of its outputs.

    Args:
        scheme: how the module is quantised.
        tensors: its tensors, by the last part of their names.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other or the config.
    """
    packed, over = tensors["weight_packed"], tensors.get("weight_global_scale")
    if packed.ndim != 2:
        raise ValueError(f"weight_packed must be a matrix, got {list(packed.shape)}")
    weight = Float4Weight(
        packed=packed,
        scale=tensors["weight_scale"],
        shape=(packed.shape[0], 2 * packed.shape[1]),
        global_scale=None if over is None else over.reshape(1) if over.ndim == 0 else over,
    )
    if not scheme.format.startswith(weight.format):
        raise TypeError(
            f"weight_scale of {scheme.format} has the dtype of {weight.format}: "
            f"{str(weight.scale.dtype).removeprefix('torch.')}"
        )
    return weight
