"""Random numbers that are the same on every machine and in every version of torch.

Integer operations alone mix a counter into 64 bits, so that golden files are byte-identical
wherever they are written. Each array has a name, and its numbers do not depend on earlier draws.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (SplitMix64).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["Draws"]

STEP = 0x9E3779B97F4A7C15 - 2**64
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


class Draws:
    """Named arrays of random numbers, from one seed.

    Args:
        seed: any integer.
        name: what the numbers are for, for example the name of a case.

    Example:
        >>> Draws(0, "case").integers("codes", (2,), -8, 7).dtype
        torch.int64
        >>> torch.equal(Draws(0, "x").normal("a", (3,)), Draws(0, "x").normal("a", (3,)))
        True
    """

    def __init__(self, seed: int, name: str) -> None:
        self.seed = seed
        self.name = name

    def uniform(self, what: str, shape: tuple[int, ...]) -> Tensor:
        """Return numbers in ``[0, 1)`` with 53 bits each: float64 of ``shape``."""
        count = 1
        for length in shape:
            count *= length
        digest = hashlib.sha256(f"{self.seed}/{self.name}/{what}".encode()).digest()
        start = int.from_bytes(digest[:8], "little", signed=True)
        mixed = torch.arange(1, count + 1, dtype=torch.int64) * STEP + start
        mixed = (mixed ^ _shifted(mixed, 30)) * FIRST
        mixed = (mixed ^ _shifted(mixed, 27)) * SECOND
        mixed = mixed ^ _shifted(mixed, 31)
        return (_shifted(mixed, 11).to(torch.float64) * 2.0**-53).reshape(shape)

    def integers(self, what: str, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        """Return integers in ``[low, high]``, both included: int64 of ``shape``."""
        return (self.uniform(what, shape) * (high - low + 1)).floor().to(torch.int64) + low

    def normal(self, what: str, shape: tuple[int, ...]) -> Tensor:
        """Return numbers of mean 0 and variance 1, none beyond 3.5: float64 of ``shape``.

        Each is a sum of four uniform numbers: libraries round logarithms differently.
        """
        four = self.uniform(what, (*shape, 4))
        total = four[..., 0] + four[..., 1] + four[..., 2] + four[..., 3]
        return (total - 2.0) * 1.7320508075688772  # sqrt(3): the sum has variance 1/3

    def permutation(self, what: str, length: int) -> Tensor:
        """Return the numbers of ``[0, length)`` in random order: int64 ``[length]``."""
        return self.uniform(what, (length,)).argsort(stable=True)


def _shifted(value: Tensor, by: int) -> Tensor:
    """Return ``value >> by`` for unsigned 64-bit numbers held in int64."""
    shifted: Tensor = (value >> by) & (2 ** (64 - by) - 1)
    return shifted
