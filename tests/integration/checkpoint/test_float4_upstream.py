"""FP4 against compressed-tensors: where it computes the same, and by how much it differs."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from int4_lora.reference import dequantize, quantize_float4
from int4_lora.reference.float4 import pack_float4, unpack_float4
from support import scalar_float4 as scalar
from support.float4 import CODES, NEAR_ONE, OF_AMAX, compared_bits, every_code_and_scale


def scheme(name):
    return preset_name_to_scheme("NVFP4A16" if name == "nvfp4" else "MXFP4A16", ["Linear"])


def upstream(weight):
    """Return compressed-tensors' decompression, in bfloat16: 0.17 leaves NVFP4 in float32."""
    tensors = {"weight_packed": weight.packed, "weight_scale": weight.scale}
    if weight.global_scale is not None:
        tensors["weight_global_scale"] = weight.global_scale
    compressor = BaseCompressor.get_value_from_registry(f"{weight.format}-pack-quantized")
    return compressor.decompress(tensors, scheme(weight.format))["weight"].to(torch.bfloat16)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_packing_is_that_of_compressed_tensors(name):
    """Its bytes, for a weight of every value times a power of two."""
    codes = torch.stack([CODES.roll(shift) for shift in range(32)]).repeat(1, 2)
    assert torch.equal(unpack_float4(pack_float4(codes)), codes)
    values = torch.tensor([scalar.e2m1(code) for code in range(16)])[codes.long()]
    one = torch.ones(32, 2) if name == "nvfp4" else torch.ones(32, 1)
    tensors = {"weight": values, "weight_scale": one, "weight_global_scale": torch.ones(1)}
    if name == "mxfp4":
        del tensors["weight_global_scale"]
    compressor = BaseCompressor.get_value_from_registry(f"{name}-pack-quantized")
    packed = compressor.compress(tensors, scheme(name))["weight_packed"]
    theirs = unpack_float4(packed)
    assert torch.equal(theirs.where(theirs != 0, codes & 8), codes)  # it may drop a zero's sign


@pytest.mark.parametrize("exponent", [-9, 0, 11])
def test_compressed_tensors_agrees_where_the_global_scale_is_a_power_of_two(exponent):
    weight = every_code_and_scale("nvfp4", 2.0**exponent)
    assert torch.equal(compared_bits(dequantize(weight)), compared_bits(upstream(weight)))


def test_compressed_tensors_rounds_in_steps_and_may_be_one_place_off():
    """It divides and multiplies in float32: a quotient beside a tie becomes the tie itself."""
    for global_scale in (*NEAR_ONE, *OF_AMAX):
        weight = every_code_and_scale("nvfp4", global_scale)
        assert torch.equal(compared_bits(dequantize(weight)), compared_bits(upstream(weight)))
    off = 0
    for odd in range(1, 256, 2):
        global_scale = float(np.float32(1 / (1 + odd / 256)))  # 1 / it is beside a tie of bfloat16
        weight = every_code_and_scale("nvfp4", global_scale)
        ours, theirs = compared_bits(dequantize(weight)), compared_bits(upstream(weight))
        assert (ours - theirs).abs().max() <= 1
        off += int((ours != theirs).any())
    assert off > 20


def test_compressed_tensors_agrees_on_e8m0_but_255():
    weight = every_code_and_scale("mxfp4")
    ours, theirs = dequantize(weight), upstream(weight)
    assert torch.equal(compared_bits(ours[:255]), compared_bits(theirs[:255]))
    assert ours[255].isnan().all()
    is_zero = (CODES.repeat(2) & 7) == 0
    assert theirs[255][~is_zero].isinf().all()  # 2^128, where OCP has NaN


@pytest.mark.parametrize("scale", [1.0, 1e-6, 300.0])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_quantising_is_that_of_compressed_tensors(name, scale):
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(24, 256, generator=generator) * scale
    dense[3, :32] = 0  # a group without weights
    dense[4, :32] *= 1e-6
    size = 16 if name == "nvfp4" else 32
    groups = dense.reshape(24, -1, size)
    settings = scheme(name).weights
    global_scale = generate_gparam(dense.amin(), dense.amax()) if name == "nvfp4" else None
    their_scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), settings, global_scale)
    tensors = {"weight": dense, "weight_scale": their_scale}
    if global_scale is not None:
        tensors["weight_global_scale"] = global_scale
    compressor = BaseCompressor.get_value_from_registry(f"{name}-pack-quantized")
    theirs = compressor.compress(tensors, scheme(name))
    ours = quantize_float4(dense, format=name)
    if name == "nvfp4":
        assert torch.equal(ours.global_scale, global_scale)
    assert torch.equal(ours.scale.view(torch.uint8), theirs["weight_scale"].view(torch.uint8))
    codes, their_codes = unpack_float4(ours.packed), unpack_float4(theirs["weight_packed"])
    is_zero = (codes & 7) == 0
    assert torch.equal(codes[~is_zero], their_codes[~is_zero])
    assert ((their_codes[is_zero] & 7) == 0).all()
