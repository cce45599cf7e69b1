"""Dense through tables of bytes: the reference's bits, in every format."""

import dataclasses

import pytest
import torch
from parameterized import parameterized

from int4_lora.integration.conversion.byte_tables import dense_rows
from int4_lora.reference import dequantize
from support.weights import bits_of, every_format, random_weight

pytestmark = pytest.mark.versions

SHAPES = {"ragged": {}, "whole words": {"rows": 13, "columns": 64}}
FORMATS = [
    (f"{shape}_{name}", {**arguments, **SHAPES[shape]})
    for shape in SHAPES
    for name, arguments in every_format()
]


@parameterized.expand(FORMATS)
def test_the_bits_are_the_references(name, arguments):
    weight = random_weight(**arguments)
    before = [one.clone() for one in (weight.packed, weight.scale)]
    assert torch.equal(bits_of(dense_rows(weight)), bits_of(dequantize(weight)))
    assert torch.equal(weight.packed, before[0])
    assert torch.equal(weight.scale, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_that_are_special(dtype):
    weight = random_weight(rows=16, columns=64, groups=2, symmetric=False, dtype=dtype)
    scale = weight.scale.clone()
    special = [float("nan"), float("inf"), 0.0, -0.0, -1.0, torch.finfo(dtype).max, 1e-45]
    scale[: len(special), 0] = torch.tensor(special).to(dtype)
    weight = dataclasses.replace(weight, scale=scale)
    found, expected = dense_rows(weight), dequantize(weight)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(bits_of(found.nan_to_num(1.0)), bits_of(expected.nan_to_num(1.0)))


def test_every_code_of_every_byte():
    packed = torch.randint(-(2**31), 2**31, (64, 128), generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        weight = random_weight(rows=64, columns=128 * 32 // bits, groups=4, bits=bits)
        weight = dataclasses.replace(weight, packed=packed.to(torch.int32))
        assert torch.equal(dense_rows(weight), dequantize(weight))
