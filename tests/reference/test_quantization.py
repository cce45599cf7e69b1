"""quantize: known answers, half a scale at most, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from int4_lora.reference import dequantize, quantize, unpack

pytestmark = pytest.mark.versions


def test_known_answer_symmetric():
    packed = quantize(torch.tensor([[7.5, -3.0, 1.5, 0.5, 2.5, -7.5, 0.0, 7.4]]), group_size=4)
    assert packed.scale.tolist() == [[1.0, 1.0]]
    # half to even: 7.5 -> 8 and clamped to 7, 1.5 -> 2, 0.5 -> 0, 2.5 -> 2, -7.5 -> -8
    assert unpack(packed.packed, 8).tolist() == [[7, -3, 2, 0, 2, -8, 0, 7]]
    assert packed.symmetric
    assert packed.group_size == 4


def test_known_answer_asymmetric():
    packed = quantize(torch.tensor([[0.0, 1.0, 14.0, 15.0]]), group_size=None, symmetric=False)
    assert packed.scale.tolist() == [[1.0]]
    assert unpack(packed.zero_point, 1, dim=0).tolist() == [[-8]]
    assert unpack(packed.packed, 4).tolist() == [[-8, -7, 6, 7]]


def test_a_group_of_zeros_has_the_eps_of_its_dtype_as_scale():
    packed = quantize(torch.zeros(2, 8, dtype=torch.float16), group_size=8)
    assert packed.scale.tolist() == [[2.0**-10]] * 2
    assert torch.equal(dequantize(packed), torch.zeros(2, 8, dtype=torch.float16))


@given(
    seed=st.integers(0, 2**31),
    magnitude=st.floats(1e-3, 1e3),
    offset=st.floats(-2, 2),
    group_size=st.sampled_from([None, 4, 8, 24]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_codes_in_range_are_within_half_a_scale(
    seed, magnitude, offset, group_size, symmetric, scale_dtype
):
    generator = torch.Generator().manual_seed(seed)
    weight = magnitude * (torch.randn(5, 24, generator=generator, dtype=torch.float64) + offset)
    packed = quantize(weight, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    scale = packed.scale.to(torch.float64).repeat_interleave(group_size or 24, dim=1)
    codes = unpack(packed.packed, 24).to(torch.float64)
    if symmetric:
        zero_point = torch.zeros_like(codes)
    else:
        zero_point = unpack(packed.zero_point, 5, dim=0).to(torch.float64)
        zero_point = zero_point.repeat_interleave(group_size or 24, dim=1)
    inside = (codes > -8) & (codes < 7)
    error = (weight - (codes - zero_point) * scale).abs()
    assert (error <= scale / 2 * (1 + 1e-12))[inside].all()
    # a clamped code is off by what the range lacks: half a step, and the rounding of s and z
    assert (error <= scale * (1 if symmetric else 1.5)).all()


@given(seed=st.integers(0, 2**31), symmetric=st.booleans())
def test_quantising_twice_changes_nothing_much(seed, symmetric):
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    once = dequantize(quantize(weight, group_size=8, symmetric=symmetric))
    twice = dequantize(quantize(once, group_size=8, symmetric=symmetric))
    step = quantize(once, group_size=8, symmetric=symmetric).scale.repeat_interleave(8, dim=1)
    assert ((once - twice).abs() <= 0.51 * step).all()


def test_a_tie_is_rounded_after_the_zero_point_is_added():
    # s = 1 and z = -7: 0.5 + z = -6.5 goes to the even -6, where round(0.5) + z would be -7
    packed = quantize(torch.tensor([[-1.0, 14.0, 0.5, 1.5]]), group_size=None, symmetric=False)
    assert (packed.scale.item(), unpack(packed.zero_point, 1, dim=0).item()) == (1.0, -7)
    assert unpack(packed.packed, 4).tolist() == [[-8, 7, -6, -6]]


def test_float64_weights_are_divided_in_float64():
    # in float32 0.5 + 2^-30 would be a tie and go to 0
    weight = torch.tensor([[7.5, 0.5 + 2.0**-30]], dtype=torch.float64)
    packed = quantize(weight, group_size=None)
    assert unpack(packed.packed, 2).tolist() == [[7, 1]]


def test_a_float64_scale_is_rounded_once():
    weight = torch.tensor([[7.5 * (1 + 2.0**-11 + 2.0**-40)]], dtype=torch.float64)
    packed = quantize(weight, group_size=None, scale_dtype=torch.float16)
    assert packed.scale.item() == 1 + 2.0**-10


def test_a_parameter_gives_a_weight_without_gradient():
    packed = quantize(torch.nn.Parameter(torch.ones(2, 8)), group_size=8)
    assert not packed.scale.requires_grad


@pytest.mark.parametrize(
    ("weight", "given_dtype", "expected"),
    [
        (torch.float16, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_scale_dtype(weight, given_dtype, expected):
    packed = quantize(torch.ones(2, 8, dtype=weight), group_size=8, scale_dtype=given_dtype)
    assert packed.scale.dtype == expected


WEIGHT = torch.ones(2, 12)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "weight must be .* got int8", lambda: quantize(WEIGHT.to(torch.int8))),
        (ValueError, r"weight must be .* got \[12\]", lambda: quantize(WEIGHT[0])),
        (ValueError, "weight must have rows", lambda: quantize(WEIGHT[:0])),
        (ValueError, "group_size must divide in_features = 12, got 128", lambda: quantize(WEIGHT)),
        (ValueError, "group_size must divide .* got 5", lambda: quantize(WEIGHT, group_size=5)),
        (ValueError, "group_size must divide .* got 0", lambda: quantize(WEIGHT, group_size=0)),
        (ValueError, "group_size must divide .* got -1", lambda: quantize(WEIGHT, group_size=-1)),
        (TypeError, "group_size must be an int", lambda: quantize(WEIGHT, group_size=4.0)),
        (
            TypeError,
            "symmetric must be a bool, got str",
            lambda: quantize(WEIGHT, group_size=4, symmetric="no"),
        ),
        (
            TypeError,
            "scale_dtype must be .* got torch.float64",
            lambda: quantize(WEIGHT, group_size=4, scale_dtype=torch.float64),
        ),
        (
            ValueError,
            r"weight must be finite, got nan at \[0, 0\]",
            lambda: quantize(WEIGHT * float("nan"), group_size=4),
        ),
        (
            ValueError,
            r"finite in float16, got 133333 for a group from 0 to 1e\+06",
            lambda: quantize(WEIGHT * 1e6, group_size=4, scale_dtype=torch.float16),
        ),
    ],
)
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()
