"""FP4 weights of every code and every scale, and the global scales they are tested with."""

import math

import numpy as np
import torch

from int4_lora.reference import Float4Weight
from int4_lora.reference.float4 import pack_float4
from support.weights import bits_of

CODES = torch.arange(16, dtype=torch.uint8)
SPECIAL = [1.0, -1.0, 0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, 2.0**-126, 2.0**127]
POWERS = [2.0**exponent for exponent in (-140, -120, -60, -9, -1, 1, 5, 11, 60, 120)]
LARGEST = float(np.finfo(np.float32).max)
NEAR_ONE = [1 + 2.0**-23, 1 - 2.0**-24, 1.5 + 2.0**-23, 2 - 2.0**-23, 1.25, 1.75]
WHOLE = [3.0, 5.0, 7.0, 448.0, 2688.0, 2689.0, 16777215.0, LARGEST]
OF_AMAX = [float(np.float32(2688 / amax)) for amax in (0.011, 0.05, 0.3, 0.7, 1.9, 12.0)]
RANDOM = np.random.default_rng(0).integers(0x00800000, 0x7F800000, 24, dtype=np.uint32)
GLOBAL_SCALES = [*SPECIAL, *POWERS, *NEAR_ONE, *WHOLE, *OF_AMAX, *RANDOM.view(np.float32).tolist()]


def every_code_and_scale(name, global_scale=None):
    """Return a weight whose row r has the scale r, and every code in each group."""
    size = 16 if name == "nvfp4" else 32
    scale = torch.arange(256, dtype=torch.uint8)[:, None]
    return Float4Weight(
        packed=pack_float4(CODES.repeat(256, size // 16)),
        scale=scale.view(torch.float8_e4m3fn) if name == "nvfp4" else scale,
        shape=(256, size),
        global_scale=None if global_scale is None else torch.tensor([global_scale]),
    )


def compared_bits(dense):
    """Return bfloat16 bits as scalar_bits gives them."""
    bits = bits_of(dense).to(torch.int64) & 0xFFFF
    return torch.where(dense.isnan(), -1, bits)
