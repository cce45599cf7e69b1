"""FP4 weights: every code and scale against a scalar decoder, and the layers on them."""

import dataclasses
import re

import numpy as np
import pytest
import torch

from int4_lora.reference import (
    Float4Weight,
    dequantize,
    error_bound,
    int4_linear,
    int4_lora_linear,
    merge,
    merge_quantized,
    quantize_float4,
)
from int4_lora.reference.dequantization import unrounded_weight
from int4_lora.reference.float4 import pack_float4, unpack_float4
from support import scalar_float4 as scalar
from support.float4 import GLOBAL_SCALES, compared_bits, every_code_and_scale
from support.weights import bits_of, narrow, random_float4, random_stack, random_x

pytestmark = pytest.mark.versions


def scalar_bits(scale_of, global_scale):
    """Return the bits of every code with every scale by the scalar decoder; -1 for NaN."""
    bits = np.empty((256, 16), dtype=np.int64)
    for byte in range(256):
        for code in range(16):
            value = scalar.weight_bits(scalar.e2m1(code), scale_of(byte), global_scale)
            bits[byte, code] = -1 if value is None else value
    return torch.from_numpy(bits)


def test_the_chosen_global_scales_differ():
    bits = {np.float32(scale).tobytes() for scale in GLOBAL_SCALES}
    assert len(bits) == len(GLOBAL_SCALES) == 64


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
def test_every_nvfp4_value_is_that_of_the_scalar_decoder(global_scale):
    dense = dequantize(every_code_and_scale("nvfp4", global_scale))
    assert dense.dtype == torch.bfloat16
    assert torch.equal(compared_bits(dense), scalar_bits(scalar.e4m3, global_scale))


def test_every_value_without_a_global_scale_is_that_of_the_scalar_decoder():
    for name, scale_of in (("nvfp4", scalar.e4m3), ("mxfp4", scalar.e8m0)):
        dense = dequantize(every_code_and_scale(name))
        expected = scalar_bits(scale_of, 1.0)
        for start in range(0, dense.shape[1], 16):
            assert torch.equal(compared_bits(dense[:, start : start + 16]), expected)


def test_values_by_hand():
    """Nibbles low first; 1.5 and -6, times 2.5 over 4; 2^-3."""
    packed = torch.tensor([[0xF3] + [0] * 7], dtype=torch.uint8)
    scale = torch.tensor([[2.5]]).to(torch.float8_e4m3fn)
    weight = Float4Weight(packed, scale, (1, 16), torch.tensor([4.0]))
    assert dequantize(weight)[0, :3].tolist() == [0.9375, -3.75, 0.0]
    packed = torch.tensor([[0x92] + [0] * 15], dtype=torch.uint8)
    weight = Float4Weight(packed, torch.tensor([[124]], dtype=torch.uint8), (1, 32))
    assert dequantize(weight)[0, :2].tolist() == [0.125, -0.0625]


def test_other_dtypes_round_the_quotient_once():
    """3 / 3.3 in float32, float16 and bfloat16: the double rounding of float16 differs."""
    weight = every_code_and_scale("nvfp4", 3.3)
    exact = dequantize(weight, torch.float64)
    numpy64 = exact.numpy()
    with np.errstate(over="ignore"):
        halves = torch.from_numpy(numpy64.astype(np.float16))
    assert torch.equal(bits_of(dequantize(weight, torch.float16)).where(~halves.isnan(), 0),
                       bits_of(halves).where(~halves.isnan(), 0))  # fmt: skip
    singles = torch.from_numpy(numpy64.astype(np.float32))
    ours = dequantize(weight, torch.float32)
    assert torch.equal(ours.nan_to_num(nan=7.0), singles.nan_to_num(nan=7.0))
    assert torch.equal(dequantize(weight, torch.bfloat16).nan_to_num(nan=7.0),
                       dequantize(weight).nan_to_num(nan=7.0))  # fmt: skip


def test_codes_of_quantised_weights_by_hand():
    """Ties go to an even mantissa; 7 is more than 6 and no power of two above 8."""
    row = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.2, -0.26, 0.0, -6.0, 5.1, 1.0, 0.5, -4.0]
    expected = [7, 0, 2, 2, 4, 4, 6, 6, 8, 9, 0, 15, 7, 2, 1, 14]
    weight = quantize_float4(torch.tensor([row * 2]), format="mxfp4")
    assert unpack_float4(weight.packed).tolist() == [expected * 2]
    assert weight.scale.item() == 127
    for amax, scale in ((6.99, 127), (7.0, 128), (8.0, 128), (3.49, 126), (3.5, 127), (1e-45, 0)):
        weight = quantize_float4(torch.full((1, 32), amax), format="mxfp4")
        assert weight.scale.item() == scale, amax
    weight = quantize_float4(torch.tensor([row]))
    assert weight.global_scale.item() == 448.0
    assert weight.scale.float().item() == 448.0
    assert unpack_float4(weight.packed).tolist() == [expected]


def test_a_zero_weight_is_zero():
    weight = quantize_float4(torch.zeros(2, 32))
    assert weight.global_scale.item() == 1.0
    assert (weight.scale.float() == 0.125).all()
    assert (dequantize(weight) == 0).all()
    weight = quantize_float4(torch.zeros(2, 32), format="mxfp4")
    assert (weight.scale == 0).all()
    assert (dequantize(weight) == 0).all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_quantising_what_was_dequantised_changes_nothing(name):
    weight = quantize_float4(
        torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).double()
    )
    if name == "mxfp4":
        weight = quantize_float4(dequantize(weight, torch.float64), format=name)
        again = quantize_float4(dequantize(weight, torch.float64), format=name)
        kept = weight.scale == again.scale  # a group may have lost its largest code
        assert kept.float().mean() > 0.9
        codes = unpack_float4(weight.packed).reshape(8, -1, 32)[kept]
        assert torch.equal(codes, unpack_float4(again.packed).reshape(8, -1, 32)[kept])
    else:
        dense = dequantize(weight, torch.float64)
        again = dequantize(quantize_float4(dense), torch.float64)
        assert (again - dense).abs().max() <= dense.abs().max() / 6


FIELDS = {
    "packed": torch.zeros(2, 32, dtype=torch.uint8),
    "scale": torch.ones(2, 4).to(torch.float8_e4m3fn),
    "shape": (2, 64),
    "global_scale": torch.ones(1),
}
E8M0 = torch.full((2, 2), 127, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"packed": torch.zeros(2, 32).int()}, TypeError, "packed must be uint8, got int32"),
        ({"packed": FIELDS["packed"][:, 1:]}, ValueError, "packed must be [out_features, in"),
        ({"packed": FIELDS["packed"][:1]}, ValueError, "packed must be [out_features, in"),
        ({"scale": torch.ones(2, 4)}, TypeError, "scale must be float8_e4m3fn or uint8, got float"),
        ({"scale": FIELDS["scale"][:, 1:]}, ValueError, "scale must be [out_features, in_features"),
        (
            {"scale": FIELDS["scale"].T},
            ValueError,
            "scale must be [out_features, in_features / 16]",
        ),
        ({"scale": E8M0}, ValueError, "global_scale must be None with the E8M0 scales of mxfp4"),
        ({"shape": (2, 63)}, ValueError, "the group size of nvfp4, 16, divides, got 63"),
        (
            {"shape": (2, 48)},
            ValueError,
            "packed must be [out_features, in_features / 2] = [2, 24]",
        ),
        ({"shape": [2]}, ValueError, "shape must be (out_features, in_features)"),
        ({"shape": (2, 64.0)}, TypeError, "shape must hold two ints"),
        ({"global_scale": torch.ones(1).half()}, TypeError, "global_scale must be float32"),
        ({"global_scale": torch.tensor(1.0)}, ValueError, "global_scale must be"),
        ({"global_scale": torch.ones(2)}, ValueError, "global_scale must be"),
        ({"global_scale": 1.0}, TypeError, "global_scale must be a tensor of float32, got float"),
        ({"global_scale": torch.ones(1, device="meta")}, ValueError, "device"),
    ],
)
def test_every_field_is_checked(fields, error, message):
    assert Float4Weight(**FIELDS).format == "nvfp4"
    with pytest.raises(error, match=re.escape(message)):
        Float4Weight(**{**FIELDS, **fields})


def test_a_weight_moves_and_gives_rows():
    for name in ("nvfp4", "mxfp4"):
        weight = random_float4(name)
        taken = weight.rows(torch.tensor([5, 0, 5]))
        assert torch.equal(dequantize(taken), dequantize(weight)[[5, 0, 5]])
        assert torch.equal(dequantize(weight.rows(slice(2, 4))), dequantize(weight)[2:4])
        meta = weight.to("meta")
        assert meta.packed.is_meta
        assert meta.scale.is_meta
        assert meta.nbytes == weight.nbytes
        with pytest.raises(ValueError, match="index must be in"):
            weight.rows(torch.tensor([13]))
    assert random_float4("nvfp4").nbytes == 13 * 32 + 13 * 4 + 4
    assert random_float4("mxfp4").nbytes == 13 * 32 + 13 * 2


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {"weight": torch.ones(2, 24)},
            ValueError,
            "the group size of nvfp4, 16, divides, got [2, 24]",
        ),
        ({"weight": torch.ones(2, 48), "format": "mxfp4"}, ValueError, "of mxfp4, 32, divides"),
        ({"weight": torch.ones(0, 16)}, ValueError, "must have rows"),
        ({"weight": torch.ones(16)}, ValueError, "weight must be [out_features, in_features]"),
        ({"weight": torch.ones(2, 16).int()}, TypeError, "weight must be float16"),
        ({"weight": torch.full((1, 16), torch.inf)}, ValueError, "finite, got inf at [0, 0]"),
        ({"weight": torch.ones(2, 16), "format": "fp4"}, ValueError, "must be 'nvfp4' or 'mxfp4'"),
    ],
)
def test_what_cannot_be_quantised(given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        quantize_float4(**given)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="codes must have an even number of columns, got 3"):
        pack_float4(torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="codes must be below 16, got 16"):
        pack_float4(torch.full((1, 2), 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match="codes must be uint8, got int8"):
        pack_float4(torch.zeros(1, 2, dtype=torch.int8))
    with pytest.raises(TypeError, match="packed must be uint8, got int32"):
        unpack_float4(torch.zeros(1, 2, dtype=torch.int32))


def by_scalar(weight):
    """Return the dense weight by the scalar decoder, float64 ``[out, in]``, not rounded."""
    scale_of = scalar.e4m3 if weight.format == "nvfp4" else scalar.e8m0
    over = 1.0 if weight.global_scale is None else weight.global_scale.item()
    scales = weight.scale.view(torch.uint8).tolist()
    packed = weight.packed.tolist()
    return torch.tensor(
        [
            [
                scalar.e2m1(packed[row][column // 2] >> 4 * (column % 2) & 15)
                * scale_of(scales[row][column // weight.group_size])
                / over
                for column in range(weight.in_features)
            ]
            for row in range(weight.out_features)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_linears_round_to_bfloat16_and_float64_does_not(name):
    weight, lora = random_float4(name), random_stack(columns=64)
    dense, ids = by_scalar(weight), torch.tensor([0, -1, 2, 1, 2, -1])
    assert torch.equal(unrounded_weight(weight), dense)
    x = random_x(columns=64)
    exact = int4_linear(x.double(), weight)
    torch.testing.assert_close(exact, x.double() @ dense.T, rtol=1e-13, atol=1e-13)
    rounded = x @ dense.to(torch.bfloat16).float().T
    assert torch.equal(int4_linear(x, weight), rounded)
    if name == "nvfp4":
        assert not torch.equal(rounded.double(), exact.float().double())
    delta = int4_lora_linear(x.double(), weight, lora, ids) - exact
    for token, adapter in enumerate(ids.tolist()):
        own = torch.zeros(13, dtype=torch.float64)
        if adapter >= 0:
            pair = lora.b[adapter].double() @ lora.a[adapter].double()
            own = lora.scaling[adapter] * (pair @ x[token].double())
        torch.testing.assert_close(delta[token], own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_the_bound_holds_and_a_wrong_weight_breaks_it(name, dtype):
    weight, lora = random_float4(name, rows=64, columns=256), random_stack(rows=64, columns=256)
    lora = type(lora)(lora.a.to(dtype), lora.b.to(dtype), lora.scaling)
    x, ids = random_x(32, 256, dtype), torch.arange(32) % 4 - 1
    exact = int4_lora_linear(x.double(), weight, lora, ids)
    bound = error_bound(x, weight, lora, ids)
    assert ((int4_lora_linear(x, weight, lora, ids).double() - exact).abs() <= bound).all()
    unrounded = (x.float() @ unrounded_weight(weight).float().T).to(dtype)
    base = int4_linear(x.double(), weight)
    limit = error_bound(x, weight, weight_rounded=False)
    assert ((unrounded.double() - base).abs() <= limit).all()
    if name == "nvfp4" and dtype == torch.float32:  # the rounded weight is the largest error
        assert limit.max() < error_bound(x, weight).max() / 10
    missed = dataclasses.replace(weight, packed=weight.packed ^ 8)  # the even columns' signs
    wrong = int4_linear(x, missed).double()
    assert ((wrong - base).abs() > error_bound(x, weight)).float().mean() > 0.9


def test_the_bound_of_float64_has_no_rounded_weight():
    weight, x = random_float4("nvfp4"), random_x(columns=64).double()
    error = (x @ by_scalar(weight).T - int4_linear(x, weight)).abs()
    bound = error_bound(x, weight)
    assert (error <= bound).all()
    assert bound.max() < 1e-12


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_merge_rounds_once_to_bfloat16(name):
    weight, lora = random_float4(name), random_stack(columns=64)
    expected = by_scalar(weight)
    expected += lora.scaling[1] * (lora.b[1].double() @ lora.a[1].double())
    merged = merge(weight, lora, 1)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, expected.to(torch.float32).to(torch.bfloat16))
    with pytest.raises(TypeError, match="weight must be a PackedWeight, got Float4Weight"):
        merge_quantized(weight, lora, 1)
    with pytest.raises(ValueError, match="lora must have the out_features of weight, 13"):
        merge(weight, narrow(lora, 12), 1)


def test_special_scales_are_data():
    nan = torch.tensor([[0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = torch.full((1, 8), 0x20, dtype=torch.uint8)  # 0 and 1
    assert dequantize(Float4Weight(packed, nan, (1, 16))).isnan().all()
    one = torch.ones(1, 1).to(torch.float8_e4m3fn)
    dense = dequantize(Float4Weight(packed, one, (1, 16), torch.zeros(1)))
    assert dense[0, :2].isnan().tolist() == [True, False]
    assert dense[0, 1] == torch.inf
    x = torch.ones(1, 16)
    bound = error_bound(x, Float4Weight(packed, one, (1, 16), torch.zeros(1)))
    assert bound.isinf().all()
