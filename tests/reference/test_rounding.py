"""round_once: float64 to sixteen bits without a second rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from int4_lora.reference.rounding import round_once

pytestmark = pytest.mark.versions

FLOAT64 = st.floats(width=64, allow_nan=True, allow_infinity=True)


@given(st.lists(FLOAT64, min_size=1, max_size=50))
def test_float16_as_numpy_rounds_it(values):
    value = np.array(values)
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(value.astype(np.float16))  # NumPy rounds once
    rounded = round_once(torch.from_numpy(value), torch.float16)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)


def ties(dtype, bits):
    """Return float64 values at, just below and just above ties of a dtype, and their roundings."""
    low = torch.linspace(1, 2, 2 ** (bits - 1) + 1, dtype=torch.float64)[:-1]
    step = 2.0 ** (1 - bits)
    even = (low / step).remainder(2) == 0
    tie = low + step / 2
    for value, up in ((tie - 2.0**-45, False), (tie + 2.0**-45, True), (tie, ~even)):
        yield value, torch.where(torch.as_tensor(up), low + step, low).to(dtype)


def test_ties_and_what_is_next_to_them():
    for dtype, bits in ((torch.float16, 11), (torch.bfloat16, 8)):
        for value, expected in ties(dtype, bits):
            assert torch.equal(round_once(value, dtype), expected)
            assert torch.equal(round_once(-value * 2.0**-9, dtype), -expected * 2.0**-9)


def test_the_ordinary_conversion_rounds_twice():
    value = torch.tensor(1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    assert value.to(torch.bfloat16) == 1.0  # what this function is for
    assert round_once(value, torch.bfloat16) == 1 + 2.0**-7
