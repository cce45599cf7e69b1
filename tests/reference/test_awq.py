"""AWQ's layout: hand-worked words, AutoAWQ's converter upstream, every scale, refusals."""

import numpy as np
import pytest
import torch

from int4_lora.reference import dequantize, from_awq, quantize, to_awq, unpack
from support.other_layouts import dequantize_awq, random_awq
from support.weights import bits_of, random_weight


def int32(words):
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


def test_known_words():
    """Outputs 0 to 7 of a word are in its nibbles 0, 4, 1, 5, 2, 6, 3, 7, counted from the low."""
    qweight = int32([[0x75316420, 0xFDB9ECA8], [0x00000001, 0x10000000]])
    qzeros = int32([[0x88888888, 0x000000F0]])
    scales = torch.arange(1, 17)[None] / 4
    weight = from_awq(qweight, qzeros, scales)
    codes = unpack(weight.packed, 2)
    assert codes[:, 0].tolist() == [-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]
    assert codes[:, 1].tolist() == [-7, *[-8] * 14, -7]
    zeros = unpack(weight.zero_point, 16, dim=0)[:, 0].tolist()
    assert zeros == [0] * 8 + [-8, -8, 7, -8, -8, -8, -8, -8]
    assert dequantize(weight)[:3, 0].tolist() == [-2, -3.5, -4.5]
    assert dequantize(weight)[10].tolist() == [-13.75, -41.25]


def test_random_tensors_decode_as_the_scalar_decoder_does():
    tensors = random_awq()
    ours = dequantize(from_awq(**tensors))
    assert torch.equal(bits_of(ours), bits_of(dequantize_awq(**tensors)))


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upstreams_converter_gives_the_same_tensors(dtype):
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    converter = getattr(converters, "AutoAWQConverter", None)
    if converter is None:
        pytest.skip("this compressed-tensors has no converter for AutoAWQ")
    tensors = random_awq()
    tensors["scales"] = tensors["scales"].to(dtype)
    theirs = converter(group_size=16).process({f"m.{name}": tensors[name] for name in tensors})
    ours = from_awq(**tensors)
    assert torch.equal(ours.packed, theirs["m.weight_packed"])
    assert torch.equal(ours.zero_point, theirs["m.weight_zero_point"])
    assert torch.equal(bits_of(ours.scale), bits_of(theirs["m.weight_scale"]))
    assert ours.shape == tuple(theirs["m.weight_shape"].tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [0, 15])
def test_every_scale_with_every_difference_of_code_and_zero_point(dtype, zero):
    """65,536 outputs, one for each scale; zero-points 0 and 15 give every difference."""
    outputs = 2**16
    tensors = {
        "qweight": int32([[code * 0x11111111] * (outputs // 8) for code in range(16)]),
        "qzeros": int32([[zero * 0x11111111] * (outputs // 8)]),
        "scales": torch.arange(outputs, dtype=torch.int32).to(torch.int16).view(dtype)[None],
    }
    ours, expected = dequantize(from_awq(**tensors)), dequantize_awq(**tensors)
    nan = expected.isnan()
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(bits_of(ours)[~nan], bits_of(expected)[~nan])


def test_the_inverse_gives_the_tensors_back():
    tensors = random_awq()
    back = to_awq(from_awq(**tensors))
    for name, tensor in tensors.items():
        assert torch.equal(getattr(back, name), tensor), name


def test_a_symmetric_weight_is_written_with_zero_points_of_8():
    weight = quantize(torch.randn(16, 64), group_size=32)
    tensors = to_awq(weight)
    assert torch.equal(tensors.qzeros, int32([[0x88888888] * 2] * 2))
    assert torch.equal(dequantize(from_awq(*tensors)), dequantize(weight))


def test_a_symmetric_weight_comes_back_symmetric():
    weight = quantize(torch.randn(16, 64), group_size=32)
    tensors = to_awq(weight)
    back = from_awq(*tensors, symmetric=True)
    assert back.zero_point is None
    assert torch.equal(back.packed, weight.packed)
    spoilt = tensors.qzeros.clone()
    spoilt[1, 0] += 0x10  # output 2 of the first word is in its nibble 1
    said = r"zero-points must be 8 in a symmetric weight, got 9 at \[1, 2\]"
    with pytest.raises(ValueError, match=said):
        from_awq(tensors.qweight, spoilt, tensors.scales, symmetric=True)


REFUSED = {
    "qweight_dtype": (
        TypeError,
        "qweight must be int32, got int16",
        {"qweight": torch.ones(64, 3, dtype=torch.int16)},
    ),
    "qzeros_dtype": (
        TypeError,
        "qzeros must be int32, got int16",
        {"qzeros": torch.ones(4, 3, dtype=torch.int16)},
    ),
    "scales_dtype": (
        TypeError,
        "scales must be .*, got float64",
        {"scales": torch.ones(4, 24).double()},
    ),
    "qzeros_missing": (TypeError, "qzeros must be a tensor of int32, got None", {"qzeros": None}),
    "qweight_of_gptq": (
        ValueError,
        r"scales must be .* = \[\*, 192\], got \[4, 24\]",
        {"qweight": int32([[1] * 24] * 8)},
    ),
    "qzeros_shape": (
        ValueError,
        r"qzeros must be .* = \[4, 3\], got \[4, 24\]",
        {"qzeros": int32([[1] * 24] * 4)},
    ),
    "groups": (
        ValueError,
        "3 groups, which do not divide in_features = 64",
        {"scales": torch.ones(3, 24), "qzeros": int32([[1] * 3] * 3)},
    ),
    "dimensions": (ValueError, "qweight must be", {"qweight": int32([1] * 24)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    error, message, arguments = REFUSED[name]
    with pytest.raises(error, match=message):
        from_awq(**{**random_awq(), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "tensor"}, "strategy 'tensor'"),
        ({"bits": 8}, "got 8 bits"),
        ({"layout": "g_idx"}, "in the order of g_idx"),
        ({"rows": 13}, "out_features in words of 8, got out_features = 13"),
    ],
)
def test_the_inverse_refuses_what_the_layout_does_not_hold(arguments, message):
    with pytest.raises(ValueError, match=message):
        to_awq(random_weight(**{"rows": 16, "columns": 64, **arguments}))
