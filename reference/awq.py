"""AWQ's layout "gemm": 4-bit codes packed along the outputs, in words with an order of their own.

Codes and zero-points are unsigned: u = q + 8. Nibble i of a word, counted from the lowest bits,
holds output ``ORDER[i]`` of the word's eight, so output o is in nibble ``PLACES[o % 8]``::

    u[o, j] = (qweight[j, o // 8] >> (4 * PLACES[o % 8])) & 15
    z[g, o] = (qzeros[g, o // 8] >> (4 * PLACES[o % 8])) & 15
    w[o, j] = RN((u[o, j] - z[g, o]) * scales[g, o]),  g = j // group_size

Source: ``WQLinear_GEMM.from_linear`` in AutoAWQ 0.2, ``awq/modules/linear/gemm.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from int4_lora.reference.checks import SCALE_DTYPES, check_dtype, check_shape, check_symmetric
from int4_lora.reference.dequantization import zero_points
from int4_lora.reference.packed_weight import PackedWeight
from int4_lora.reference.packing import pack, unpack

__all__ = ["AWQTensors", "from_awq", "to_awq"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQTensors(NamedTuple):
    """The tensors of a module in AWQ's layout "gemm".

    Args:
        qweight: int32 ``[in_features, out_features / 8]``.
        qzeros: int32 ``[groups, out_features / 8]``.
        scales: ``[groups, out_features]``.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def from_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, symmetric: bool = False
) -> PackedWeight:
    """Return the packed weight of a module in AWQ's layout "gemm", exactly.

    Args:
        qweight: int32 ``[in_features, out_features / 8]``, nibbles in AWQ's order.
        qzeros: int32 ``[groups, out_features / 8]``, nibbles in the same order.
        scales: ``[groups, out_features]``, float16, bfloat16 or float32.
        symmetric: whether every zero-point is 8, as GPTQModel writes it with ``zero_point`` false;
            the result then stores none.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor has the wrong shape, the groups do not divide in_features, or a
            zero-point is not 8 although ``symmetric``.

    Example:
        >>> from int4_lora.reference import dequantize
        >>> word = torch.tensor([[0x75316420]], dtype=torch.int32)  # eight outputs of an input
        >>> zeros = torch.zeros(1, 1, dtype=torch.int32)
        >>> dequantize(from_awq(word, zeros, torch.ones(1, 8))).T
        tensor([[0., 1., 2., 3., 4., 5., 6., 7.]])

    Source:
        ``WQLinear_GEMM`` in AutoAWQ 0.2; ``AWQuantLinear`` in GPTQModel 7.
    """
    check_dtype("qweight", qweight, (torch.int32,))
    check_dtype("qzeros", qzeros, (torch.int32,))
    check_dtype("scales", scales, SCALE_DTYPES)
    check_shape("qweight", qweight, (None, None), "[in_features, out_features / 8]")
    columns, words = qweight.shape
    check_shape("scales", scales, (None, 8 * words), "[groups, out_features]")
    check_shape("qzeros", qzeros, (scales.shape[0], words), "[groups, out_features / 8]")
    zero_point = _unpack(qzeros)  # [groups, out]
    if symmetric:
        check_symmetric(zero_point, 4)
    return PackedWeight(
        packed=pack(_unpack(qweight).T),
        scale=scales.T.contiguous(),
        shape=(8 * words, columns),
        zero_point=None if symmetric else pack(zero_point.T, dim=0),
    )


def to_awq(weight: PackedWeight) -> AWQTensors:
    """Return the tensors of a weight in AWQ's layout "gemm"; the inverse of ``from_awq``.

    A symmetric weight gets the zero-point that it means, which AWQ stores as 8.

    Args:
        weight: 4 bits, one scale for each row, or for each row and group in column order;
            out_features must be a multiple of 8.

    Raises:
        ValueError: the weight has 8 bits, another strategy or a g_idx, or out_features is not a
            multiple of 8.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = quantize(torch.randn(16, 64), group_size=32, symmetric=False)
        >>> torch.equal(from_awq(*to_awq(weight)).packed, weight.packed)
        True
    """
    if weight.bits != 4 or weight.strategy not in ("channel", "group") or not weight.column_order:
        order = "column order" if weight.column_order else "the order of g_idx"
        raise ValueError(
            "weight must have 4 bits and groups in column order, "
            f"got {weight.bits} bits, strategy {weight.strategy!r} in {order}"
        )
    rows, columns = weight.shape
    if rows % 8:
        raise ValueError(f"weight must have out_features in words of 8, got out_features = {rows}")
    table = zero_points(weight)
    zero_point = torch.zeros_like(weight.scale, dtype=torch.int8) if table is None else table
    return AWQTensors(
        _pack(unpack(weight.packed, columns).T),
        _pack(zero_point.T),
        weight.scale.T.contiguous(),
    )


def _unpack(words: Tensor) -> Tensor:
    """Return the signed codes in words of eight outputs: int8 ``[rows, out_features]``."""
    codes = unpack(words, 8 * words.shape[1])  # in the order of the nibbles
    return codes.reshape(*words.shape, 8)[:, :, PLACES].flatten(1)


def _pack(codes: Tensor) -> Tensor:
    """Return int32 words with the codes of eight outputs each; the inverse of ``_unpack``."""
    rows, outputs = codes.shape
    return pack(codes.reshape(rows, outputs // 8, 8)[:, :, ORDER].flatten(1))
