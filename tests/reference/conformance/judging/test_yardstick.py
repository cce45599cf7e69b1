"""The yardstick of the rms rule: the larger error of two orders of the products."""

import pytest
import torch

from int4_lora.reference import PackedWeight, pack
from int4_lora.reference.conformance import Manifest, Operands
from int4_lora.reference.conformance.judging.answers import answer
from int4_lora.reference.conformance.judging.yardstick import yardstick_rms
from support.weights import random_x

pytestmark = pytest.mark.versions


def test_where_neighbours_cancel_the_other_order_counts():
    codes = torch.tensor([1, -1], dtype=torch.int8).repeat(32, 64)  # [32, 128]
    weight = PackedWeight(pack(codes), torch.ones(32, 1), shape=(32, 128))
    x = random_x(tokens=16, columns=64).repeat_interleave(2, dim=1)  # exact in pairs: always 0
    operands = Operands(x=x, weight=weight)
    held = answer("int4_linear", operands, Manifest())
    assert not held.exact.any()
    lost = x[:, ::2].abs().sum(1).max() * 2**-24  # the largest that one rounding of a sum can be
    assert lost / 1000 < yardstick_rms("int4_linear", operands, Manifest(), held) < 128 * lost
