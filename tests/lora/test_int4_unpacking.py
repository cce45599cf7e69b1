"""Unpacking INT4 weights: per channel, grouped and asymmetric, as a checkpoint stores them.

Every expected number is worked by hand from the layout: eight codes an int32, the first in the
lowest four bits, stored plus 8; zero-points packed the same way along the outputs.
"""

import numpy as np
import pytest
import torch

from int4_lora.reference import PackedWeight, dequantize, unpack

pytestmark = pytest.mark.versions


def int32(words):
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


# codes -8 .. -1 and 0 .. 7: stored 0 .. 7 and 8 .. 15
LOW_WORD, HIGH_WORD = 0x76543210, 0xFEDCBA98


def test_codes():
    codes = unpack(int32([[LOW_WORD, HIGH_WORD]]), 16)
    assert codes.tolist() == [list(range(-8, 8))]


def test_per_channel():
    weight = PackedWeight(
        packed=int32([[LOW_WORD], [HIGH_WORD]]),
        scale=torch.tensor([[0.5], [2.0]], dtype=torch.float16),
        shape=(2, 8),
    )
    assert weight.strategy == "channel"
    assert dequantize(weight).tolist() == [
        [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5],
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0],
    ]


def test_grouped():
    weight = PackedWeight(
        packed=int32([[LOW_WORD, HIGH_WORD]]),
        scale=torch.tensor([[1.0, 10.0, 100.0, 1000.0]]),
        shape=(1, 16),
        group_size=4,
    )
    assert weight.strategy == "group"
    assert dequantize(weight).tolist() == [
        [-8, -7, -6, -5, -40, -30, -20, -10, 0, 100, 200, 300, 4000, 5000, 6000, 7000]
    ]


def test_grouped_in_activation_order():
    weight = PackedWeight(
        packed=int32([[LOW_WORD]]),
        scale=torch.tensor([[1.0, 100.0]]),
        shape=(1, 8),
        g_idx=torch.tensor([1, 0, 1, 0, 0, 1, 0, 1], dtype=torch.int32),
    )
    assert dequantize(weight).tolist() == [[-800, -7, -600, -5, -4, -300, -2, -100]]


def test_asymmetric():
    # zero-points of three outputs: 7, 0, -8, stored 15, 8, 0 in one word for each of two groups
    weight = PackedWeight(
        packed=int32([[LOW_WORD]] * 3),
        scale=torch.ones(3, 2),
        shape=(3, 8),
        zero_point=int32([[0x0000008F, 0x000000F8]]),
        group_size=4,
    )
    assert not weight.symmetric
    assert dequantize(weight).tolist() == [
        [-15, -14, -13, -12, -4, -3, -2, -1],  # z = 7 and 0
        [-8, -7, -6, -5, -11, -10, -9, -8],  # z = 0 and 7
        [0, 1, 2, 3, 4, 5, 6, 7],  # z = -8 and -8
    ]


def test_a_width_that_is_no_multiple_of_eight():
    weight = PackedWeight(
        packed=int32([[LOW_WORD, 0x00000008]]), scale=torch.tensor([[3.0]]), shape=(1, 9)
    )
    assert dequantize(weight).tolist() == [[-24, -21, -18, -15, -12, -9, -6, -3, 0]]


def test_two_values_in_a_byte_is_another_format():
    with pytest.raises(TypeError, match="packed must be int32, got uint8"):
        PackedWeight(torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1, 1), shape=(1, 8))
