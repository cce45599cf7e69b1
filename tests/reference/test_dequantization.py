"""dequantize: against the scalar opinion in every format, and by hand where scales are special."""

import dataclasses
import math
import unittest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parameterized import parameterized

from int4_lora.reference import PackedWeight, dequantize, pack
from support import scalar
from support.weights import bits_of, every_format, random_weight

pytestmark = pytest.mark.versions


class EveryFormat(unittest.TestCase):
    @parameterized.expand(every_format())
    def test_equals_the_scalar_opinion(self, name, arguments):
        weight = random_weight(**arguments)
        dense = dequantize(weight)
        assert dense.dtype == weight.scale.dtype
        expected = torch.from_numpy(scalar.dequantize(weight)).to(dense.dtype)
        assert torch.equal(bits_of(dense), bits_of(expected))

    @parameterized.expand([("float16",), ("bfloat16",), ("float32",), ("float64",)])
    def test_casts_after_rounding(self, name):
        dtype = getattr(torch, name)
        weight = random_weight(symmetric=False, dtype=torch.bfloat16)
        assert torch.equal(dequantize(weight, dtype), dequantize(weight).to(dtype))


def one_row(codes, scale, dtype=torch.float32, zero_point=None):
    codes = torch.tensor([codes], dtype=torch.int8)
    if zero_point is not None:
        zero_point = pack(torch.tensor([[zero_point]], dtype=torch.int8), dim=0)
    scale = torch.tensor([[scale]], dtype=dtype)
    return PackedWeight(pack(codes), scale, shape=(1, codes.shape[1]), zero_point=zero_point)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("codes", "scale", "zero_point", "expected"),
    [
        ([-8, 0, 7], 0.5, None, [-4.0, 0.0, 3.5]),
        ([-8, 0, 7], 0.5, 7, [-7.5, -3.5, 0.0]),
        ([-8, 0, 7], 0.5, -8, [0.0, 4.0, 7.5]),
        ([-8, 0, 7], -0.5, None, [4.0, -0.0, -3.5]),
        ([-8, 0, 7], 0.0, None, [-0.0, 0.0, 0.0]),
        ([-8, 0, 7], -0.0, None, [0.0, -0.0, -0.0]),
        ([-8, 0, 7], INF, None, [-INF, NAN, INF]),
        ([-8, 0, 7], NAN, 3, [NAN, NAN, NAN]),
        ([-8, 0, 7], 5000.0, -8, [0.0, 40000.0, INF]),  # 15 * 5000 is beyond float16
        ([1, 3, 7], 2.0**-24, None, [2.0**-24, 3 * 2.0**-24, 7 * 2.0**-24]),  # subnormal
    ],
)
def test_scales_of_any_value_in_float16(codes, scale, zero_point, expected):
    dense = dequantize(one_row(codes, scale, torch.float16, zero_point))[0]
    expected = torch.tensor(expected, dtype=torch.float16)
    assert torch.equal(dense.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(bits_of(dense[known]), bits_of(expected[known]))


def test_the_product_is_rounded_once_and_after_the_subtraction():
    # 11 * (1 + 2^-7) = 11.0859375 lies between 11.0625 and 11.125 of bfloat16, nearer the first;
    # 3 * s and 8 * s rounded apart are 3.03125 and 8.0625, whose sum rounds to the second
    weight = one_row([3], 1 + 2.0**-7, torch.bfloat16, -8)
    assert dequantize(weight).item() == 11.0625


def test_a_group_keeps_to_its_own_columns():
    weight = random_weight("group", symmetric=False)
    for group in range(4):
        scale = weight.scale.clone()
        scale[:, group] *= 2
        changed = dequantize(dataclasses.replace(weight, scale=scale)) != dequantize(weight)
        columns = changed.any(dim=0).nonzero().flatten().tolist()
        assert columns == list(range(11 * group, 11 * group + 11))


@given(st.permutations(range(44)))
def test_a_permutation_of_g_idx_permutes_columns(order):
    order = torch.tensor(order)
    weight = random_weight("g_idx")
    codes = dequantize(dataclasses.replace(weight, scale=torch.ones(13, 4)))
    permuted = dataclasses.replace(
        weight, packed=pack(codes[:, order].to(torch.int8)), g_idx=weight.g_idx[order]
    )
    assert torch.equal(dequantize(permuted), dequantize(weight)[:, order])


def test_g_idx_of_positions_equals_none():
    weight = random_weight("group", symmetric=False)
    g_idx = (torch.arange(44) // 11).to(torch.int32)
    assert torch.equal(dequantize(dataclasses.replace(weight, g_idx=g_idx)), dequantize(weight))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_group_for_the_whole_row_is_a_channel(symmetric):
    channel = random_weight("channel", symmetric=symmetric)
    group = dataclasses.replace(channel, group_size=channel.in_features)
    assert (channel.strategy, group.strategy) == ("channel", "channel")
    assert torch.equal(dequantize(group), dequantize(channel))


def test_unbalanced_groups_need_not_divide():
    weight = random_weight("group", columns=44)
    g_idx = torch.tensor([0] * 30 + [2] * 14, dtype=torch.int32)
    three = dataclasses.replace(weight, scale=weight.scale[:, :3], g_idx=g_idx)
    dense = dequantize(three)
    codes = dequantize(dataclasses.replace(weight, scale=torch.ones(13, 4)))
    assert torch.equal(dense[:, :30], codes[:, :30] * weight.scale[:, :1])
    assert torch.equal(dense[:, 30:], codes[:, 30:] * weight.scale[:, 2:3])


def test_refuses():
    weight = random_weight()
    with pytest.raises(
        TypeError, match="weight must be a PackedWeight or Float4Weight, got Tensor"
    ):
        dequantize(weight.packed)
    with pytest.raises(TypeError, match=r"dtype must be float16, .* got torch\.int8"):
        dequantize(weight, torch.int8)
