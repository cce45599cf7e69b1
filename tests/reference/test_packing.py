"""pack and unpack: hand-worked words, every word, properties, and what is refused."""

import unittest

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from parameterized import parameterized

from int4_lora.reference import pack, unpack
from support import scalar

pytestmark = pytest.mark.versions

KNOWN = [
    ("ascending", 4, [-8, -7, -6, -5, -4, -3, -2, 7], [0xF6543210]),
    ("all_low", 4, [-8] * 8, [0x00000000]),
    ("all_high", 4, [7] * 8, [0xFFFFFFFF]),
    ("zeros", 4, [0] * 8, [0x88888888]),
    ("last_nibble", 4, [-8] * 7 + [0], [0x80000000]),
    ("ragged", 4, [0, 1, 2], [0x00000A98]),
    ("two_words", 4, [-8] * 8 + [1], [0x00000000, 0x00000009]),
    ("bytes", 8, [-128, -1, 0, 127], [0xFF807F00]),
    ("ragged_bytes", 8, [-128, -128, -127, 0, 1], [0x80010000, 0x00000081]),
]


def int32(words):
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.int32))


class KnownWords(unittest.TestCase):
    @parameterized.expand(KNOWN)
    def test_along_rows(self, name, bits, codes, words):
        codes, words = torch.tensor([codes], dtype=torch.int8), int32(words)[None]
        assert torch.equal(pack(codes, bits=bits), words)
        assert torch.equal(unpack(words, codes.shape[1], bits=bits), codes)

    @parameterized.expand(KNOWN)
    def test_along_columns(self, name, bits, codes, words):
        codes, words = torch.tensor([codes], dtype=torch.int8).T, int32(words)[:, None]
        assert torch.equal(pack(codes, bits=bits, dim=0), words)
        assert torch.equal(unpack(words, codes.shape[0], bits=bits, dim=0), codes)


def test_every_byte_in_every_place_decodes_as_the_scalar_opinion_does():
    words = int32([byte << 8 * place for byte in range(256) for place in range(4)])[:, None]
    for bits in (4, 8):
        expected = [scalar.unpack_row(row, 32 // bits, bits) for row in words.tolist()]
        assert torch.equal(
            unpack(words, 32 // bits, bits=bits), torch.tensor(expected).to(torch.int8)
        )


@st.composite
def codes_bits_dim(draw):
    bits, dim = draw(st.sampled_from([4, 8])), draw(st.sampled_from([0, 1]))
    values = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=20))
    return torch.from_numpy(draw(hnp.arrays(np.int8, shape, elements=values))), bits, dim


@hypothesis.given(codes_bits_dim())
def test_unpack_inverts_pack(drawn):
    codes, bits, dim = drawn
    packed = pack(codes, bits=bits, dim=dim)
    assert packed.shape[dim] == -(-codes.shape[dim] * bits // 32)
    assert torch.equal(unpack(packed, codes.shape[dim], bits=bits, dim=dim), codes)


@hypothesis.given(codes_bits_dim())
def test_padding_is_stored_zero(drawn):
    codes, bits, dim = drawn
    packed = pack(codes, bits=bits, dim=dim)
    whole = unpack(packed, packed.shape[dim] * 32 // bits, bits=bits, dim=dim)
    padding = whole.narrow(dim, codes.shape[dim], whole.shape[dim] - codes.shape[dim])
    assert torch.equal(padding, torch.full_like(padding, -(2 ** (bits - 1))))


def test_layouts_that_are_not_contiguous():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    strided = torch.stack([codes, codes], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(pack(strided), pack(codes))
    packed = pack(codes)
    assert torch.equal(unpack(packed.T.contiguous().T, 32), codes)
    assert torch.equal(unpack(packed[::2], 32), codes[::2])


def test_empty():
    assert pack(torch.empty(3, 0, dtype=torch.int8)).shape == (3, 0)
    assert unpack(torch.empty(3, 0, dtype=torch.int32), 0).shape == (3, 0)


CODES = torch.zeros(2, 9, dtype=torch.int8)
WORDS = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"codes must be in \[-8, 7\] for 4 bits, got 9", lambda: pack(CODES + 9)),
        (ValueError, r"codes must be in \[-8, 7\] for 4 bits, got -9", lambda: pack(CODES - 9)),
        (TypeError, "codes must be int8, got int32", lambda: pack(CODES.int())),
        (TypeError, "codes must be a tensor of int8, got list", lambda: pack([[1]])),
        (ValueError, r"codes must be \[out_features, in_features\]", lambda: pack(CODES[0])),
        (ValueError, "bits must be 4 or 8, got 3", lambda: pack(CODES, bits=3)),
        (ValueError, "bits must be 4 or 8, got 4.0", lambda: pack(CODES, bits=4.0)),
        (ValueError, "bits must be 4 or 8, got tensor", lambda: pack(CODES, bits=torch.tensor(4))),
        (ValueError, "dim must be 0 or 1, got 1.0", lambda: unpack(WORDS, 9, dim=1.0)),
        (ValueError, "dim must be 0 or 1, got 2", lambda: pack(CODES, dim=2)),
        (ValueError, "dim must be 0 or 1, got -1", lambda: unpack(WORDS, 9, dim=-1)),
        (ValueError, "bits must be 4 or 8, got 16", lambda: unpack(WORDS, 9, bits=16)),
        (TypeError, "packed must be int32, got int64", lambda: unpack(WORDS.long(), 9)),
        (TypeError, "packed must be int32, got uint8", lambda: unpack(WORDS.to(torch.uint8), 9)),
        (ValueError, r"packed .* size 8 .* got \[2, 2\]", lambda: unpack(WORDS, 8)),
        (ValueError, r"packed .* size 17 .* got \[2, 2\]", lambda: unpack(WORDS, 17)),
        (ValueError, r"packed .* dim 0 .* got \[2, 2\]", lambda: unpack(WORDS, 17, dim=0)),
        (ValueError, "size must not be negative, got -1", lambda: unpack(WORDS, -1)),
        (ValueError, r"packed .* size 4611686018427387904", lambda: unpack(WORDS, 2**62)),
        (TypeError, "size must be an int, got float", lambda: unpack(WORDS, 9.0)),
    ],
)
def test_refuses(error, message, call):
    with pytest.raises(error, match=message):
        call()
