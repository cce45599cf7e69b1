"""Integer codes packed into int32 words, as compressed-tensors stores them.

A code q is signed; it is stored as the unsigned number u = q + 2**(bits - 1). One word holds
32 / bits stored codes, the first in the lowest bits: element i of a row is in word
i // (32 / bits), at bit bits * (i % (32 / bits)). The unused bits of a row's last word are zero.

Source: ``compressed_tensors/compressors/pack_quantized/helpers.py``, compressed-tensors 0.17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.reference.checks import check_dtype, check_shape

__all__ = ["check_bits", "code_range", "pack", "unpack", "words_for"]


def pack(codes: Tensor, *, bits: int = 4, dim: int = 1) -> Tensor:
    """Pack signed codes into int32 words along ``dim``.

    ``word[w] = sum_i (codes[w * n + i] + 2**(bits - 1)) << (bits * i)`` with n = 32 / bits.

    Args:
        codes: int8 ``[out_features, in_features]``, each in ``[-2**(bits-1), 2**(bits-1) - 1]``.
        bits: 4 or 8.
        dim: the dimension that is packed: 1 for weights, 0 for zero-points.

    Returns:
        int32 ``[out_features, ceil(in_features / n)]`` for ``dim=1``, or
        ``[ceil(out_features / n), in_features]`` for ``dim=0``.

    Raises:
        TypeError: ``codes`` is not an int8 tensor.
        ValueError: not 2-D, a code out of range, or ``bits`` or ``dim`` not allowed.

    Example:
        >>> codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, 7]], dtype=torch.int8)
        >>> hex(pack(codes).item() & 0xFFFFFFFF)
        '0xf6543210'
    """
    check_bits(bits)
    check_dim(dim)
    check_dtype("codes", codes, (torch.int8,))
    check_shape("codes", codes, (None, None), "[out_features, in_features]")
    low, high = code_range(bits)
    if not codes.is_meta:  # a meta tensor has no values
        wrong = codes[(codes < low) | (codes > high)]
        if wrong.numel():
            first = wrong[0].item()
            raise ValueError(f"codes must be in [{low}, {high}] for {bits} bits, got {first}")

    rows = codes if dim == 1 else codes.T
    per_word = 32 // bits
    words = words_for(rows.shape[1], bits)
    stored = rows.to(torch.int32) - low  # [rows, columns], 0 <= stored < 2**bits
    stored = torch.nn.functional.pad(stored, (0, words * per_word - rows.shape[1]))
    shifts = bits * torch.arange(per_word, dtype=torch.int32, device=codes.device)
    shifted: Tensor = stored.reshape(rows.shape[0], words, per_word) << shifts
    packed = shifted.sum(dim=2, dtype=torch.int32)  # disjoint bits: the sum is their union
    return packed if dim == 1 else packed.T.contiguous()


def unpack(packed: Tensor, size: int, *, bits: int = 4, dim: int = 1) -> Tensor:
    """Unpack int32 words into signed codes; the inverse of ``pack``.

    ``codes[w * n + i] = ((word[w] >> (bits * i)) & (2**bits - 1)) - 2**(bits - 1)`` with
    n = 32 / bits. The mask is needed: ``>>`` on int32 copies the sign bit.

    Args:
        packed: int32 ``[out_features, ceil(in_features / n)]``, low bits first, for ``dim=1``.
        size: the length of ``dim`` before packing; the rest of the last word is padding.
        bits: 4 or 8.
        dim: the packed dimension.

    Returns:
        int8 ``[out_features, in_features]``.

    Raises:
        TypeError: ``packed`` is not an int32 tensor, or ``size`` is not an int.
        ValueError: not 2-D, a width that contradicts ``size``, or ``bits`` or ``dim`` not allowed.

    Example:
        >>> unpack(torch.tensor([[-162254320]], dtype=torch.int32), 8)
        tensor([[-8, -7, -6, -5, -4, -3, -2,  7]], dtype=torch.int8)
    """
    check_bits(bits)
    check_dim(dim)
    check_dtype("packed", packed, (torch.int32,))
    if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool):
        raise TypeError(f"size must be an int, got {type(size).__name__}")
    if size < 0:
        raise ValueError(f"size must not be negative, got {size}")
    check_shape("packed", packed, (None, None), "2-D")
    if packed.shape[dim] != words_for(size, bits):
        raise ValueError(
            f"packed must have {words_for(size, bits)} words along dim {dim} for size {size} "
            f"at {bits} bits, got {list(packed.shape)}"
        )

    rows = packed if dim == 1 else packed.T
    low, _ = code_range(bits)
    shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=packed.device)
    stored: Tensor = (rows.unsqueeze(2) >> shifts) & (2**bits - 1)  # [rows, words, per word]
    codes = (stored.flatten(1)[:, :size] + low).to(torch.int8)
    return codes if dim == 1 else codes.T.contiguous()


def code_range(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest signed code of ``bits`` bits.

    Example:
        >>> code_range(4)
        (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def words_for(size: int, bits: int) -> int:
    """Return the number of int32 words that hold ``size`` codes of ``bits`` bits.

    Example:
        >>> words_for(9, bits=4)
        2
    """
    per_word = 32 // bits
    return (size + per_word - 1) // per_word


def check_bits(bits: object) -> None:
    """Check that ``bits`` is a width that the format has.

    Raises:
        ValueError: ``bits`` is neither 4 nor 8.
    """
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")


def check_dim(dim: object) -> None:
    """Check that ``dim`` names one of the two dimensions of a weight.

    Raises:
        ValueError: ``dim`` is neither 0 nor 1.
    """
    if type(dim) is not int or dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim!r}")
