"""From weights to FP4 codes, in a stated order and arithmetic.

In float32, or float64 for a float64 weight, with amax the largest magnitude of the weight or of a
group of it:

nvfp4
    1. global_scale = 448 * 6 / amax of the weight, rounded to float32; 1 where amax is 0 or the
       quotient is infinite
    2. scale = global_scale * (amax of the group / 6), rounded to E4M3; a scale of 0 becomes 0.125
    3. s = scale / global_scale
mxfp4
    1. 2^e = amax of the group rounded to a power of two: down, if amax is below 1.75 * 2^e
    2. scale = e - 2 + 127, at least 0 and at most 254; s = 2^(scale - 127)

then code = w / s, rounded to E2M1: to nearest, ties to an even mantissa, at most 6 in magnitude.

Source: ``generate_gparam`` and ``calculate_qparams`` in
``compressed_tensors/quantization/utils/helpers.py``, ``generate_mx_scales`` in
``mxfp4_utils.py`` and ``FP4_E2M1_DATA.cast_to_fp4`` in ``quant_args.py``, which give the same
tensors for float32 weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from int4_lora.reference.checks import X_DTYPES, check_dtype, check_shape
from int4_lora.reference.float4 import e8m0_values, pack_float4
from int4_lora.reference.float4_weight import Float4Weight

__all__ = [
    "mxfp4_scales",
    "nearest_codes",
    "nvfp4_global_scale",
    "nvfp4_scales",
    "quantize_float4",
]

LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
SMALLEST_SCALE = 0.125  # E4M3's eps, for groups whose scale would be 0
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between neighbouring E2M1 magnitudes


@torch.no_grad()
def quantize_float4(weight: Tensor, *, format: Literal["nvfp4", "mxfp4"] = "nvfp4") -> Float4Weight:
    """Quantise a dense weight to FP4, one scale for each row and group of 16 or 32 columns.

    Args:
        weight: ``[out_features, in_features]``, float16, bfloat16, float32 or float64.
        format: "nvfp4" for groups of 16 with E4M3 scales and a global scale, "mxfp4" for groups of
            32 with E8M0 scales.

    Returns:
        The FP4 weight.

    Raises:
        TypeError: a wrong dtype.
        ValueError: another format, or a weight that is not 2-D, not finite, or has in_features that
            the group size does not divide.

    Example:
        >>> weight = torch.tensor([6.0, -3.0, 1.0, 0.0]).repeat(1, 8)
        >>> packed = quantize_float4(weight, format="mxfp4")
        >>> packed.scale.item(), [hex(byte) for byte in packed.packed[0, :2].tolist()]
        (127, ['0xd7', '0x2'])

    Source:
        The module's docstring.
    """
    check_dtype("weight", weight, X_DTYPES)
    check_shape("weight", weight, (None, None), "[out_features, in_features]")
    if format not in ("nvfp4", "mxfp4"):
        raise ValueError(f"format must be 'nvfp4' or 'mxfp4', got {format!r}")
    rows, columns = weight.shape
    size = 16 if format == "nvfp4" else 32
    if 0 in (rows, columns) or columns % size:
        raise ValueError(
            f"weight must have rows, and in_features that the group size of {format}, {size}, "
            f"divides, got {[rows, columns]}"
        )
    w = weight if weight.dtype == torch.float64 else weight.to(torch.float32)
    wrong = (~w.isfinite()).nonzero()
    if wrong.numel():
        i, j = wrong[0].tolist()
        raise ValueError(f"weight must be finite, got {w[i, j].item()} at [{i}, {j}]")
    groups = w.reshape(rows, columns // size, size)
    amax = groups.abs().amax(dim=2)  # [rows, groups]
    if format == "nvfp4":
        global_scale = nvfp4_global_scale(amax.amax())
        scale = nvfp4_scales(amax, global_scale)
        s = scale.to(w.dtype) / global_scale.to(w.dtype)
    else:
        scale, global_scale = mxfp4_scales(amax), None
        s = e8m0_values(scale).to(w.dtype)
    codes = nearest_codes(groups / s[:, :, None]).reshape(rows, columns)
    return Float4Weight(pack_float4(codes), scale, (rows, columns), global_scale)


def nvfp4_global_scale(largest: Tensor) -> Tensor:
    """Return the global scale of a weight whose largest magnitude is given: float32 ``[1]``."""
    global_scale = (LARGEST_E4M3 * LARGEST_E2M1 / largest).to(torch.float32).reshape(1)
    return torch.where(global_scale.isinf(), 1.0, global_scale)


def nvfp4_scales(amax: Tensor, global_scale: Tensor) -> Tensor:
    """Return the E4M3 scales of groups with these magnitudes, under a global scale."""
    exact = global_scale.to(amax.dtype) * (amax / LARGEST_E2M1)
    scale = exact.clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
    is_zero = scale.to(torch.float32) == 0
    smallest = torch.full_like(exact, SMALLEST_SCALE).to(torch.float8_e4m3fn)
    bits = torch.where(is_zero, smallest.view(torch.uint8), scale.view(torch.uint8))
    return bits.view(torch.float8_e4m3fn)


def mxfp4_scales(amax: Tensor) -> Tensor:
    """Return the E8M0 scales of groups with these magnitudes."""
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2^exponent, mantissa in [0.5, 1)
    power = exponent - 1 + (mantissa >= 0.875).to(torch.int32)
    biased = torch.where(amax == 0, 0, power - 2 + 127)
    return biased.clamp(0, 254).to(torch.uint8)


def nearest_codes(scaled: Tensor) -> Tensor:
    """Return the E2M1 codes nearest to values, ties to an even mantissa: uint8, the same shape."""
    midpoints = torch.tensor(MIDPOINTS, dtype=scaled.dtype, device=scaled.device)
    size = scaled.abs()
    below = torch.bucketize(size, midpoints)  # how many midpoints are below the value
    to_above = torch.bucketize(size, midpoints, right=True)  # or equal to it
    magnitude = torch.where(below % 2 == 1, to_above, below)  # of two codes, the even one
    sign = scaled.signbit().to(torch.uint8) << 3
    return magnitude.to(torch.uint8) | sign
