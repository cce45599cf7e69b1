"""Layouts: they return the checkpoint's tensors bit for bit, and dequantise to the same rows."""

import dataclasses
import unittest

import pytest
import torch
from parameterized import parameterized

from int4_lora.compiled import PreparedWeight, layouts, prepare
from int4_lora.reference import PackedWeight, dequantize
from support.weights import bits_of, every_format, random_weight

pytestmark = pytest.mark.versions

SHAPES = {
    "ragged": {"rows": 13, "columns": 44},
    "whole_words": {"rows": 13, "columns": 64},
    "int4pack": {"rows": 48, "columns": 128},
    "int4pack_blocks": {"rows": 144, "columns": 256},
    "int4pack_channel": {"rows": 64, "columns": 544, "layout": "channel"},
}
CASES = [
    (f"{shape}_{name}", {**arguments, **SHAPES[shape]})
    for shape in SHAPES
    for name, arguments in every_format()
    if shape != "int4pack_channel" or arguments["layout"] == "channel"
]


def with_another_code(weight):
    packed = weight.packed.clone()
    packed[-1, -1] ^= 1  # the lowest code of the last word, which is never padding
    return dataclasses.replace(weight, packed=packed)


class EveryLayout(unittest.TestCase):
    @parameterized.expand(CASES)
    def test_tensors_come_back_and_rows_are_the_same(self, name, arguments):
        weight = random_weight(**arguments)
        dense = dequantize(weight)
        for layout in layouts(weight):
            prepared = prepare(weight, layout=layout)
            assert isinstance(prepared, PreparedWeight)
            assert prepared.shape == weight.shape
            assert prepared.scale_dtype == weight.scale.dtype
            assert prepared.holds(weight)
            assert not prepared.holds(with_another_code(weight))
            back = prepared.packed_weight()
            for field in dataclasses.fields(PackedWeight):
                mine, theirs = getattr(back, field.name), getattr(weight, field.name)
                if isinstance(theirs, torch.Tensor):
                    assert mine.dtype == theirs.dtype
                    mine, theirs = (one.flatten().view(torch.uint8) for one in (mine, theirs))
                    assert torch.equal(mine, theirs), (layout, field.name)
                else:
                    assert mine == theirs, (layout, field.name)
            in_order = torch.cat(
                [prepared.dense_rows(*block, dense.dtype) for block in prepared.blocks(16)]
            )
            assert torch.equal(bits_of(in_order), bits_of(dense)), layout
            order = getattr(prepared, "order", None)
            expected = dense if order is None else dense[:, order]
            for start in range(0, weight.out_features, prepared.tile):
                stop = min(start + prepared.tile, weight.out_features)
                rows = prepared.rows(start, stop, dense.dtype)
                assert torch.equal(bits_of(rows), bits_of(expected[start:stop])), layout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"rows": 48, "columns": 128}, ["int4pack", "interleaved", "checkpoint"]),
        ({"rows": 48, "columns": 128, "layout": "g_idx_minus_one"},
         ["int4pack", "interleaved", "checkpoint"]),
        ({"rows": 48, "columns": 128, "symmetric": False}, ["interleaved", "checkpoint"]),
        ({"rows": 48, "columns": 128, "layout": "g_idx"}, ["interleaved", "checkpoint"]),
        ({"rows": 47, "columns": 128}, ["interleaved", "checkpoint"]),
        ({"rows": 48, "columns": 64}, ["interleaved", "checkpoint"]),  # groups of 16
        ({"rows": 48, "columns": 128, "layout": "g_idx_unbalanced"}, ["checkpoint"]),
        ({"rows": 48, "columns": 128, "layout": "block"}, ["checkpoint"]),
        ({"rows": 48, "columns": 128, "layout": "tensor"}, ["checkpoint"]),
        ({"rows": 48, "columns": 128, "bits": 8}, ["int8", "checkpoint"]),
        ({"rows": 47, "columns": 44, "bits": 8, "symmetric": False}, ["int8", "checkpoint"]),
        ({"rows": 48, "columns": 128, "bits": 8, "layout": "g_idx"}, ["int8", "checkpoint"]),
        ({"rows": 48, "columns": 128, "bits": 8, "layout": "g_idx_unbalanced"}, ["checkpoint"]),
        ({"rows": 48, "columns": 128, "bits": 8, "layout": "block"}, ["checkpoint"]),
        ({"rows": 48, "columns": 42, "bits": 8, "groups": 3}, ["checkpoint"]),  # 10.5 words
        ({"rows": 48, "columns": 44}, ["checkpoint"]),  # groups of 11
    ],
)  # fmt: skip
def test_which_layouts_hold_a_weight(arguments, expected):
    weight = random_weight(**arguments, dtype=torch.bfloat16)
    assert layouts(weight) == expected
    assert type(prepare(weight)) is type(prepare(weight, layout=expected[0]))
    wide = dataclasses.replace(weight, scale=weight.scale.float())
    first = next(name for name in expected if name != "int4pack")
    assert layouts(wide)[0] == first
    assert sorted(layouts(wide)) == sorted(expected)


@pytest.mark.parametrize(
    ("group_size", "layout", "most"),
    [
        (128, "int4pack", 0.12),
        (32, "int4pack", 0.12),
        (128, "interleaved", 0.0),
        (32, "interleaved", 0.0),
        (32, "int8", 0.0),
    ],
)
def test_what_a_layout_costs(group_size, layout, most):
    groups, bits = 1024 // group_size, 8 if layout == "int8" else 4
    weight = random_weight(
        rows=256, columns=1024, groups=groups, bits=bits, dtype=torch.bfloat16, symmetric=bits == 4
    )
    prepared = prepare(weight, layout=layout)
    assert weight.nbytes <= prepared.nbytes <= weight.nbytes * (1 + most)


def test_weights_of_two_gigabytes_are_not_given_to_torchs_operator():
    """The operator counts bytes in 32 bits, so it would read outside such a weight."""
    for rows, wanted in ((2**17 - 16, "int4pack"), (2**17, "interleaved")):
        weight = PackedWeight(
            torch.zeros(1, 2**12, dtype=torch.int32).expand(rows, -1),
            torch.ones(1, 2**8, dtype=torch.bfloat16).expand(rows, -1),
            shape=(rows, 2**15),
        )
        assert layouts(weight)[0] == wanted


def test_8_bits_are_signed_bytes_in_the_order_of_the_checkpoint():
    words = torch.tensor([[0x807F0100 - 2**32, 0x000000FF]], dtype=torch.int32)
    weight = PackedWeight(words, torch.tensor([[2.0, 0.5]]), shape=(1, 8), bits=8)
    prepared = prepare(weight)
    assert prepared.codes.tolist() == [[-128, -127, -1, 0, 127, -128, -128, -128]]
    assert prepared.rows(0, 1, torch.float32).tolist() == [
        [-256.0, -254.0, -2.0, 0.0, 63.5, -64.0, -64.0, -64.0]
    ]


def test_refuses():
    weight = random_weight(rows=48, columns=128, symmetric=False)
    with pytest.raises(
        TypeError, match="weight must be a PackedWeight or Float4Weight, got Tensor"
    ):
        prepare(torch.ones(2))
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'marlin'"):
        prepare(weight, layout="marlin")
    with pytest.raises(ValueError, match="'int4pack' cannot hold this weight: zero-points"):
        prepare(weight, layout="int4pack")
    with pytest.raises(
        ValueError, match="'interleaved' cannot hold this weight: unbalanced groups"
    ):
        prepare(random_weight("g_idx_unbalanced", columns=64), layout="interleaved")
    with pytest.raises(ValueError, match="'int8' cannot hold this weight: 4 bits"):
        prepare(weight, layout="int8")
