"""Weights are rounded to the dtype of their scales in graphs, bit by bit like the reference's."""

import pytest
import torch

from int4_lora.compiled.rounding import rounded, scaled
from support.weights import bits_of

pytestmark = pytest.mark.versions

CODES = torch.arange(-255, 256, dtype=torch.int16)  # of 8 bits, minus a zero-point


def every_scale(dtype):
    """Return every number of a 16-bit dtype: NaN, infinities and subnormal numbers, too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same_bits(mine, theirs):
    """Return whether two tensors have the same bits, but for the signs of zeros and NaN."""
    if not torch.equal(mine.isnan(), theirs.isnan()):
        return False
    mine, theirs = (torch.where(each.isnan() | (each == 0), 0, each) for each in (mine, theirs))
    return torch.equal(bits_of(mine), bits_of(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_every_scale(dtype):
    """A sum follows in the same graph, in front of which Inductor omits casts to 16 bits."""

    @torch.compile(fullgraph=True)
    def graph(codes, scale):
        weights = scaled(codes, scale).to(torch.float32)
        return weights + 0.0, (weights - codes.float() * scale.float()).abs().amax()

    scale = every_scale(dtype)
    some = CODES[::17] if dtype == torch.bfloat16 else CODES[::13]
    theirs = some[:, None].to(dtype) * scale
    mine, _ = graph(some[:, None], scale)
    normal = scale.float().abs() >= 2.0**-126  # the flags of a CPU may flush smaller numbers
    theirs = theirs.float() + 0.0
    assert same_bits(mine[:, normal], theirs[:, normal])
    assert same_bits(scaled(some[:, None], scale).float() + 0.0, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ties_and_what_is_beside_them(dtype):
    """Every number of the dtype, the middle to the next, and the float32 to either side of it."""
    ends = every_scale(dtype if dtype.itemsize == 2 else torch.bfloat16).float()
    ends = ends[ends.isfinite() & (ends.abs() >= 2.0**-100) | (ends == 0)].sort().values
    middle = ((ends[1:].double() + ends[:-1].double()) / 2).float()
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-3e38, 3e38)]
    beyond = torch.tensor([65519.996, 65520.0, 65536.0, 1e30, torch.inf])
    values = torch.cat([ends, middle, *beside, beyond, -beyond])
    compiled = torch.compile(lambda values: rounded(values, dtype) * 1.0, fullgraph=True)
    expected = values.to(dtype).float()
    assert same_bits(compiled(values), expected)
    assert same_bits(rounded(values, dtype), expected)
    assert expected.isinf().sum() == (8 if dtype == torch.float16 else 2)


def test_a_nan_of_a_gpu_stays_one():
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        compiled = torch.compile(lambda values, dtype=dtype: rounded(values, dtype), fullgraph=True)
        assert compiled(nan).isnan().all()
