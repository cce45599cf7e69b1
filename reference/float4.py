"""From FP4 tensors to numbers: E2M1 codes, E8M0 and E4M3 scales.

A code times a scale is exact in float64: 2 bits times 4. Divided by the global scale it is rounded
to float64, which loses nothing for narrower dtypes: with 6 bits above and 24 below the line, a
quotient that is no tie of float32, float16 or bfloat16 is at least a relative 2^-50 away from
every tie, so that rounding the rounded quotient is rounding the exact one.

Source: "OCP Microscaling Formats (MX) Specification", version 1.0, sections 5.3.3 (E2M1) and 5.4
(E8M0); ``compressed_tensors/compressors/nvfp4/helpers.py`` for the nibbles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.reference.checks import check_dtype, check_shape
from int4_lora.reference.float4_weight import Float4Weight

__all__ = [
    "E2M1",
    "code_values",
    "e8m0_values",
    "group_scales",
    "pack_float4",
    "scale_values",
    "unpack_float4",
    "unrounded_float4",
]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def pack_float4(codes: Tensor) -> Tensor:
    """Pack E2M1 codes two to a byte, the even column in the low nibble.

    Args:
        codes: uint8 ``[out_features, in_features]``, each below 16; in_features must be even.

    Returns:
        uint8 ``[out_features, in_features / 2]``.

    Raises:
        TypeError: ``codes`` is not a uint8 tensor.
        ValueError: not 2-D, an odd width, or a code above 15.

    Example:
        >>> [hex(byte) for byte in pack_float4(torch.tensor([[1, 2, 15, 0]]).byte())[0].tolist()]
        ['0x21', '0xf']
    """
    check_dtype("codes", codes, (torch.uint8,))
    check_shape("codes", codes, (None, None), "[out_features, in_features]")
    if codes.shape[1] % 2:
        raise ValueError(f"codes must have an even number of columns, got {codes.shape[1]}")
    if not codes.is_meta and codes.numel() and codes.max() > 15:
        raise ValueError(f"codes must be below 16, got {int(codes.max())}")
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_float4(packed: Tensor) -> Tensor:
    """Return the E2M1 codes of packed bytes: uint8, twice as wide, each below 16.

    Args:
        packed: uint8 ``[out_features, in_features / 2]``.

    Raises:
        TypeError: ``packed`` is not a uint8 tensor.
        ValueError: not 2-D.

    Example:
        >>> unpack_float4(torch.tensor([[0x21, 0x0F]], dtype=torch.uint8)).tolist()
        [[1, 2, 15, 0]]
    """
    check_dtype("packed", packed, (torch.uint8,))
    check_shape("packed", packed, (None, None), "[out_features, in_features / 2]")
    return torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)


def code_values(weight: Float4Weight) -> Tensor:
    """Return the value of every code: float64 ``[out_features, in_features]``, exact."""
    table = torch.tensor(E2M1, dtype=torch.float64, device=weight.packed.device)
    return table[unpack_float4(weight.packed).to(torch.int64)]


def e8m0_values(scale: Tensor) -> Tensor:
    """Return ``2^(scale - 127)`` of uint8 scales in float64, exact; NaN for 255.

    Example:
        >>> e8m0_values(torch.tensor([126, 127, 255], dtype=torch.uint8)).tolist()
        [0.5, 1.0, nan]
    """
    bits = (scale.to(torch.int64) + (1023 - 127)) << 52  # the exponent field of float64
    return torch.where(scale == 255, torch.nan, bits.view(torch.float64))


def scale_values(scale: Tensor) -> Tensor:
    """Return the values of scales in float64, exact.

    Args:
        scale: float8_e4m3fn, whose values are its own, or uint8, E8M0; of any shape.

    Example:
        >>> scale_values(torch.tensor([0.0625, -448.0]).to(torch.float8_e4m3fn)).tolist()
        [0.0625, -448.0]
    """
    return e8m0_values(scale) if scale.dtype == torch.uint8 else scale.to(torch.float64)


def group_scales(weight: Float4Weight) -> Tensor:
    """Return the scale of every group before the division: float64 ``[out, groups]``, exact."""
    return scale_values(weight.scale)


def unrounded_float4(weight: Float4Weight) -> Tensor:
    """Return the weight in float64: ``[out_features, in_features]``.

    It is exact without a global scale, and the rounded quotient with one.
    """
    scale = group_scales(weight).repeat_interleave(weight.group_size, dim=1)
    product = code_values(weight) * scale
    if weight.global_scale is None:
        return product
    return product / weight.global_scale.to(torch.float64)
