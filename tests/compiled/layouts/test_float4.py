"""The layout of FP4: its words, its table of scales, and every weight rounded as the reference."""

import dataclasses

import pytest
import torch

from int4_lora.compiled import layouts, prepare
from int4_lora.reference import Float4Weight, dequantize
from int4_lora.reference.float4 import pack_float4
from support.float4 import CODES, GLOBAL_SCALES, every_code_and_scale
from support.scalar_float4 import e2m1, e4m3, weight_bits
from support.weights import bits_of, random_float4

pytestmark = pytest.mark.versions

FORMATS = ("nvfp4", "mxfp4")


def every_scale(name, global_scale=None):
    """Return a weight of 128 columns whose row r has the scale r and all codes in each group."""
    narrow = every_code_and_scale(name, global_scale)
    return dataclasses.replace(
        narrow,
        packed=narrow.packed.repeat(1, 128 // narrow.in_features),
        scale=narrow.scale.view(torch.uint8)
        .repeat(1, 128 // narrow.in_features)
        .view(narrow.scale.dtype),
        shape=(256, 128),
    )


def same_bits(one, other):
    """Return whether two dense weights agree bit for bit; a NaN is like any other."""
    return bool(((bits_of(one) == bits_of(other)) | (one.isnan() & other.isnan())).all())


def test_a_nibble_of_consecutive_words_has_consecutive_columns():
    """Columns 0 to 15 have the code 0, columns 16 to 31 the code 1, and so on; then 0 to 15."""
    by_group = torch.arange(128, dtype=torch.uint8) // 16
    by_column = torch.arange(128, dtype=torch.uint8) % 16
    packed = pack_float4(torch.stack([torch.cat([by_group, by_column])]))
    weight = Float4Weight(packed, torch.full((1, 8), 127, dtype=torch.uint8), (1, 256))
    words = prepare(weight).words[0]
    assert words[:16].tolist() == [0x76543210] * 16
    assert words[16:24].tolist() == [0x11111111 * code for code in range(8)]
    assert words[24:].tolist() == [0x11111111 * code - 2**32 for code in range(8, 16)]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [64, 128, 384])
def test_tensors_come_back_and_rows_are_the_same(name, columns):
    weight = random_float4(name, rows=77, columns=columns)
    assert layouts(weight) == (["float4"] if columns % 128 == 0 else []) + ["checkpoint"]
    other = dataclasses.replace(weight, packed=weight.packed.clone())
    other.packed[-1, -1] ^= 1
    scales = weight.scale.view(torch.uint8).clone()
    scales[-1, -1] ^= 1
    another_scale = dataclasses.replace(weight, scale=scales.view(weight.scale.dtype))
    for layout in layouts(weight):
        prepared = prepare(weight, layout=layout)
        assert (prepared.shape, prepared.scale_dtype) == (weight.shape, torch.bfloat16)
        assert prepared.holds(weight)
        assert not prepared.holds(other)
        assert not prepared.holds(another_scale)
        back = prepared.packed_weight()
        assert back.format == name
        assert torch.equal(back.packed, weight.packed)
        assert back.scale.dtype == weight.scale.dtype
        assert torch.equal(back.scale.view(torch.uint8), weight.scale.view(torch.uint8))
        assert (back.global_scale is None) == (weight.global_scale is None)
        assert back.global_scale is None or torch.equal(back.global_scale, weight.global_scale)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            rounded = dequantize(weight, None if dtype != torch.float64 else dtype).to(dtype)
            blocks = [prepared.rows(*block, dtype) for block in prepared.blocks(16)]
            assert torch.equal(bits_of(torch.cat(blocks)), bits_of(rounded)), (layout, dtype)
        part = prepared.part(0, 77 if layout == "checkpoint" else 3)
        assert same_bits(part.rows(0, 3, torch.float32), dequantize(weight)[:3].float())


def test_another_global_scale_is_noticed():
    weight = random_float4("nvfp4", columns=128)
    prepared = prepare(weight)
    assert not prepared.holds(dataclasses.replace(weight, global_scale=torch.tensor([3.0])))
    assert not prepared.holds(dataclasses.replace(weight, global_scale=None))
    assert not prepared.holds(random_float4("mxfp4", columns=128))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_and_scale_without_a_global_scale(name):
    weight = every_scale(name)
    assert layouts(weight)[0] == "float4"
    dense = prepare(weight).rows(0, 256, torch.bfloat16)
    assert same_bits(dense, dequantize(weight))


def test_every_code_and_scale_with_every_global_scale():
    """A table may be wrong in its last bit where 24 bits decide how a quotient is rounded."""
    for global_scale in GLOBAL_SCALES:
        weight = every_scale("nvfp4", global_scale)
        exact = dequantize(weight)
        assert layouts(weight) == ["float4", "checkpoint"], global_scale
        for layout in layouts(weight):
            dense = prepare(weight, layout=layout).rows(0, 256, torch.bfloat16)
            assert same_bits(dense, exact), (layout, global_scale)


def test_a_scalar_decoder_agrees():
    """Half of the pairs of a code and a scale, with a global scale that rounds nearly all."""
    weight = every_scale("nvfp4", 2688 / 0.7)
    over = weight.global_scale.item()
    bits = bits_of(prepare(weight).rows(0, 256, torch.bfloat16))[:, :16]
    for byte in range(0, 256, 2):
        expected = [weight_bits(e2m1(code), e4m3(byte), over) for code in CODES.tolist()]
        assert [one & 0xFFFF for one in bits[byte].tolist()] == expected, byte


def test_what_the_layout_costs_and_refuses():
    weight = random_float4("nvfp4", rows=256, columns=1024)
    assert weight.nbytes < prepare(weight).nbytes < 1.03 * weight.nbytes
    with pytest.raises(ValueError, match="'float4' cannot hold this weight: rows of 64 columns"):
        prepare(random_float4("nvfp4", columns=64), layout="float4")
    with pytest.raises(ValueError, match=r"layout must be one of \['float4', 'checkpoint'\]"):
        prepare(weight, layout="interleaved")
    with pytest.raises(TypeError, match="must be a PackedWeight or Float4Weight, got Tensor"):
        prepare(torch.ones(2))
