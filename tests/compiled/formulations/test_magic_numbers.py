"""Nibbles as float32: every code at every place of a word, and random words."""

import pytest
import torch

from int4_lora.compiled.formulations.magic_numbers import (
    CODE_SCALES,
    EXPONENT_OF_ONE,
    decoded,
    decoded_rows,
)
from int4_lora.reference import unpack

pytestmark = pytest.mark.versions

ONE = torch.tensor(EXPONENT_OF_ONE, dtype=torch.int32)


def words(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def nibbles_of(packed):
    pairs = zip(decoded(packed, ONE), CODE_SCALES, strict=True)
    return torch.stack([(fraction - 1) * c for fraction, c in pairs], dim=-1)


def test_every_code_at_every_place():
    single = torch.tensor([[code << (4 * place)] for place in range(8) for code in range(16)])
    packed = single.to(torch.int32)  # wraps at 2^31, as stored words do
    found = nibbles_of(packed)
    assert torch.equal(found[:, 0], unpack(packed, 8).float() + 8)


def test_random_words_are_decoded_as_the_reference_does():
    packed = words(5, 3)
    found = nibbles_of(packed)
    assert torch.equal(found.flatten(1), unpack(packed, 24).float() + 8)


def test_rows_are_decoded_as_the_reference_does():
    packed = words(3, 4)
    halves = torch.stack([packed & 0xFFFF, packed >> 16], dim=1).flatten(0, 1)
    for rows in (17, 24):
        found = (decoded_rows(halves.to(torch.int16), rows, ONE) - 1) * 256
        assert torch.equal(found, unpack(packed, rows, dim=0).float() + 8)
