"""GPTQ's layout: hand-worked words, a scalar decoder, every scale, the inverse, refusals."""

import dataclasses

import numpy as np
import pytest
import torch

from int4_lora.reference import dequantize, from_gptq, quantize, to_gptq, unpack
from support.other_layouts import dequantize_gptq, packed_zeros, random_gptq
from support.weights import bits_of, random_weight


def int32(words):
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def test_known_words():
    """Two groups of eight inputs, eight outputs; output o of group 0 has the codes o, o + 1, ..."""
    first = [0x76543210, 0x87654321, 0x98765432, 0xA9876543, 0xBA987654, 0xCBA98765]
    qweight = int32([[*first, 0xDCBA9876, 0xEDCBA987], [0xF000000F] * 8])
    qzeros = int32([[0x77777777], [0xE0000000]])  # version 1: 8 everywhere; 1, and 15 for the last
    scales = torch.full((2, 8), 0.5)
    weight = from_gptq(qweight, qzeros, scales)
    codes = unpack(weight.packed, 16)
    assert codes[0].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1, 7, -8, -8, -8, -8, -8, -8, 7]
    assert codes[7, :8].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]
    assert unpack(weight.zero_point, 8, dim=0).tolist() == [[0, -7]] * 7 + [[0, 7]]
    dense = dequantize(weight)
    assert dense[0, :8].tolist() == [-4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5]
    assert dense[0, 8:].tolist() == [7, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5, 7]
    assert dense[7, 8:].tolist() == [0, -7.5, -7.5, -7.5, -7.5, -7.5, -7.5, 0]


def test_known_bytes():
    qweight = int32([[0xFF807F00] * 4])
    weight = from_gptq(qweight, int32([[0x7F7F7F7F]]), torch.ones(1, 4), bits=8, symmetric=True)
    assert weight.symmetric
    assert dequantize(weight)[3].tolist() == [-128, -1, 0, 127]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("g_idx", [False, True])
def test_random_tensors_decode_as_the_scalar_decoder_does(version, bits, g_idx):
    tensors = random_gptq(bits=bits, g_idx=g_idx)
    weight = from_gptq(**tensors, bits=bits, zero_plus_one=version == 1)
    expected = dequantize_gptq(**tensors, bits=bits, version=version)
    assert torch.equal(bits_of(dequantize(weight)), bits_of(expected))
    assert (weight.g_idx is not None) == g_idx


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("version", "zeros"), [(1, (1, 15)), (2, (0, 15))])
def test_every_scale_with_every_difference_of_code_and_zero_point(dtype, version, zeros):
    """65,536 outputs, one for each scale; zero-points 0 and 15 give every difference."""
    outputs = 2**16
    scales = torch.arange(outputs, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    qweight = int32([[0x76543210] * outputs, [0xFEDCBA98] * outputs])
    for zero in zeros:
        stored = np.full((1, outputs), zero - 1 if version == 1 else zero)
        tensors = {"qweight": qweight, "qzeros": packed_zeros(stored, 4), "scales": scales}
        ours = dequantize(from_gptq(**tensors, zero_plus_one=version == 1))
        expected = dequantize_gptq(**tensors, version=version)
        nan = expected.isnan()
        assert torch.equal(ours.isnan(), nan)
        assert torch.equal(bits_of(ours)[~nan], bits_of(expected)[~nan])


@pytest.mark.parametrize("g_idx", [None, "given", "unbalanced"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_plus_one", [True, False])
def test_the_inverse_gives_the_tensors_back(g_idx, bits, zero_plus_one):
    tensors = random_gptq(bits=bits, g_idx=g_idx)
    if g_idx == "unbalanced":
        tensors["g_idx"] = (torch.arange(64) % 7 % 4).to(torch.int32)
    elif g_idx is None:
        tensors["g_idx"] = (torch.arange(64) // 16).to(torch.int32)  # always stored
    weight = from_gptq(**tensors, bits=bits, zero_plus_one=zero_plus_one)
    back = to_gptq(weight, zero_plus_one=zero_plus_one)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(back, name), tensor), name
    assert (weight.g_idx is None) == (g_idx is None)


def test_a_symmetric_weight_comes_back_symmetric():
    weight = random_weight("group", rows=16, columns=64)
    back = from_gptq(*to_gptq(weight), symmetric=True)
    assert back.zero_point is None
    assert torch.equal(dequantize(back), dequantize(weight))


def test_a_ragged_last_group_keeps_g_idx():
    """24 columns in groups of 16: only g_idx says where the second group begins."""
    tensors = random_gptq(columns=24, groups=2)
    tensors["g_idx"] = (torch.arange(24) // 16).to(torch.int32)
    weight = from_gptq(**tensors)
    assert torch.equal(weight.g_idx, tensors["g_idx"])
    assert torch.equal(dequantize(weight), dequantize_gptq(**tensors))
    uneven = random_gptq(columns=24, groups=5)
    with pytest.raises(ValueError, match="5 groups, which do not divide in_features = 24 evenly"):
        from_gptq(**uneven)


def test_the_order_of_columns_may_be_given_without_values():
    tensors = {name: tensor.to("meta") for name, tensor in random_gptq(g_idx=True).items()}
    assert from_gptq(**tensors, symmetric=True).shape == (24, 64)


def changed(**tensors):
    return {**random_gptq(g_idx=True), **tensors}


REFUSED = {
    "qweight_dtype": (
        TypeError,
        "qweight must be int32, got int64",
        {"qweight": torch.ones(8, 24, dtype=torch.int64)},
    ),
    "qzeros_dtype": (
        TypeError,
        "qzeros must be int32, got float16",
        {"qzeros": torch.ones(4, 3).half()},
    ),
    "scales_dtype": (
        TypeError,
        "scales must be float16, bfloat16 or float32, got int32",
        {"scales": int32([[1] * 24] * 4)},
    ),
    "g_idx_dtype": (
        TypeError,
        "g_idx must be int32, got int64",
        {"g_idx": torch.zeros(64, dtype=torch.int64)},
    ),
    "qweight_missing": (
        TypeError,
        "qweight must be a tensor of int32, got None",
        {"qweight": None},
    ),
    "qweight_shape": (
        ValueError,
        r"qweight must be \[in_features / 8, out_features\] = \[\*, 24\], got \[8, 16\]",
        {"qweight": int32([[1] * 16] * 8)},
    ),
    "qzeros_shape": (
        ValueError,
        r"qzeros must be .* = \[4, 3\], got \[3, 3\]",
        {"qzeros": int32([[1] * 3] * 3)},
    ),
    "awq_zeros_too_wide": (
        ValueError,
        r"qzeros must be .* = \[4, 3\], got \[4, 24\]",
        {"qzeros": int32([[1] * 24] * 4)},
    ),
    "no_groups": (
        ValueError,
        r"scales must have at least one group, got \[0, 24\]",
        {"scales": torch.ones(0, 24), "qzeros": torch.ones(0, 3, dtype=torch.int32)},
    ),
    "scales_dimensions": (ValueError, "scales must be", {"scales": torch.ones(24)}),
    "g_idx_shape": (
        ValueError,
        r"g_idx must be \[in_features\] = \[64\], got \[32\]",
        {"g_idx": torch.zeros(32, dtype=torch.int32)},
    ),
    "g_idx_too_large": (
        ValueError,
        r"g_idx must be in \[0, 4\), the groups of scales, got 4",
        {"g_idx": torch.full((64,), 4, dtype=torch.int32)},
    ),
    "g_idx_negative": (
        ValueError,
        r"g_idx must be in \[0, 4\), the groups of scales, got -1",
        {"g_idx": torch.full((64,), -1, dtype=torch.int32)},
    ),
    "g_idx_zeros": (
        ValueError,
        "more than the first of 4 groups",
        {"g_idx": torch.zeros(64, dtype=torch.int32)},
    ),
    "zero_of_16": (
        ValueError,
        r"means the zero-point 16, which 4 bits do not hold, got 15 at \[1, 7\]",
        {"qzeros": int32([[0, 0, 0], [0xF0000000, 0, 0], [0] * 3, [0] * 3])},
    ),
    "skewed": (
        ValueError,
        r"zero-points must be 8 in a symmetric weight, got 1 at \[0, 0\]",
        {"qzeros": int32([[0x77777770, 0, 0]] * 4), "symmetric": True},
    ),
    "bits": (ValueError, "bits must be 4 or 8, got 3", {"bits": 3}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        from_gptq(**changed(**arguments))


def test_outputs_must_fill_words():
    with pytest.raises(ValueError, match="out_features in words of 8, got out_features = 12"):
        from_gptq(int32([[1] * 12]), int32([[1, 1]]), torch.ones(1, 12))


def test_the_inverse_refuses_what_the_layout_does_not_hold():
    weight = quantize(torch.randn(16, 64), group_size=32, symmetric=False)
    lowest = dataclasses.replace(weight, zero_point=torch.zeros_like(weight.zero_point))
    with pytest.raises(ValueError, match="zero_point must be above -8 in a GPTQ file of version 1"):
        to_gptq(lowest)
    back = from_gptq(*to_gptq(lowest, zero_plus_one=False), zero_plus_one=False)
    assert torch.equal(back.zero_point, lowest.zero_point)
    with pytest.raises(ValueError, match="got strategy 'tensor'"):
        to_gptq(random_weight("tensor", rows=16, columns=64))
    with pytest.raises(ValueError, match="out_features in words of 8, got out_features = 13"):
        to_gptq(random_weight(rows=13, columns=64))
    with pytest.raises(ValueError, match="in_features in words of 8, got in_features = 44"):
        to_gptq(random_weight(rows=16, columns=44))
