"""GPTQ's layout: codes of 4 or 8 bits, packed along the inputs.

Codes and zero-points are unsigned: u = q + 2**(bits - 1). With n = 32 / bits codes in a word, the
first in the lowest bits::

    u[o, j] = (qweight[j // n, o] >> (bits * (j % n))) & (2**bits - 1)
    z[g, o] = (qzeros[g, o // n] >> (bits * (o % n))) & (2**bits - 1), plus 1 in files of version 1
    w[o, j] = RN((u[o, j] - z[g_idx[j], o]) * scales[g_idx[j], o])

Source: ``QuantLinear.pack`` in AutoGPTQ 0.7, ``auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py``;
``checkpoint_format`` of GPTQModel for the two versions of ``qzeros``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from int4_lora.reference.checks import SCALE_DTYPES, check_dtype, check_shape, check_symmetric
from int4_lora.reference.dequantization import scale_columns, zero_points
from int4_lora.reference.packed_weight import PackedWeight
from int4_lora.reference.packing import check_bits, code_range, pack, unpack

__all__ = ["GPTQTensors", "from_gptq", "to_gptq"]


class GPTQTensors(NamedTuple):
    """The tensors of a module in GPTQ's layout, with n = 32 / bits codes in a word.

    Args:
        qweight: int32 ``[in_features / n, out_features]``.
        qzeros: int32 ``[groups, out_features / n]``.
        scales: ``[groups, out_features]``.
        g_idx: int32 ``[in_features]``, the group of each column; None in column order.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    zero_plus_one: bool = True,
    symmetric: bool = False,
    bits: int = 4,
) -> PackedWeight:
    """Return the packed weight of a module in GPTQ's layout, exactly.

    Args:
        qweight: int32 ``[in_features / n, out_features]``, n = 32 / bits, low bits first.
        qzeros: int32 ``[groups, out_features / n]``, low bits first.
        scales: ``[groups, out_features]``, float16, bfloat16 or float32.
        g_idx: int32 ``[in_features]``, the group of each column, or None for groups in column
            order. If it is in column order, the result has none.
        zero_plus_one: whether ``qzeros`` holds the zero-points minus 1, as files of version 1
            (``checkpoint_format`` "gptq") do; those of version 2 ("gptq_v2") hold them as they are.
        symmetric: whether every zero-point is 2**(bits - 1); the result then stores none.
        bits: 4 or 8.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a tensor has the wrong shape; a zero-point is 2**bits, which the codes do not
            reach and some tools read as 0, or is not 2**(bits - 1) although ``symmetric``;
            ``g_idx`` is out of range, or names the first of several groups only, which some tools
            read as column order.

    Example:
        >>> from int4_lora.reference import dequantize
        >>> word = torch.tensor([[0x76543210]], dtype=torch.int32)  # eight inputs of an output
        >>> weight = from_gptq(word.repeat(1, 8), word, torch.ones(1, 8))
        >>> dequantize(weight)[:2]  # zero-points 1, 2, ...
        tensor([[-1.,  0.,  1.,  2.,  3.,  4.,  5.,  6.],
                [-2., -1.,  0.,  1.,  2.,  3.,  4.,  5.]])

    Source:
        ``QuantLinear.forward`` in AutoGPTQ 0.7, ``qlinear_cuda_old.py``.
    """
    check_bits(bits)
    check_dtype("qweight", qweight, (torch.int32,))
    check_dtype("qzeros", qzeros, (torch.int32,))
    check_dtype("scales", scales, SCALE_DTYPES)
    check_shape("scales", scales, (None, None), "[groups, out_features]")
    (groups, rows), per_word = scales.shape, 32 // bits
    if groups == 0:
        raise ValueError(f"scales must have at least one group, got {[*scales.shape]}")
    _check_whole_words("scales", "out_features", rows, per_word)
    check_shape("qweight", qweight, (None, rows), f"[in_features / {per_word}, out_features]")
    words = (groups, rows // per_word)
    check_shape("qzeros", qzeros, words, f"[groups, out_features / {per_word}]")
    columns = per_word * qweight.shape[0]
    _check_whole_words("qweight", "in_features", columns, per_word)  # refuses none
    if g_idx is not None:
        check_dtype("g_idx", g_idx, (torch.int32,))
        check_shape("g_idx", g_idx, (columns,), "[in_features]")
        _check_groups(g_idx, groups)
    zero_point = _read_zero_points(qzeros, rows, bits, zero_plus_one, symmetric)  # [groups, out]
    return PackedWeight(
        packed=qweight.T.contiguous(),
        scale=scales.T.contiguous(),
        shape=(rows, columns),
        zero_point=None if symmetric else pack(zero_point.T, bits=bits, dim=0),
        g_idx=None if g_idx is None or _in_column_order(g_idx, groups) else g_idx,
        bits=bits,
    )


def to_gptq(weight: PackedWeight, *, zero_plus_one: bool = True) -> GPTQTensors:
    """Return the tensors of a weight in GPTQ's layout; the inverse of ``from_gptq``.

    Args:
        weight: one scale for each row, or for each row and group; both lengths must fill words.
        zero_plus_one: whether ``qzeros`` holds the zero-points minus 1, as files of version 1 do.

    Raises:
        ValueError: the weight has another strategy, a length does not fill words, or a zero-point
            is -2**(bits - 1), for which version 1 would have to store -1.

    Example:
        >>> from int4_lora.reference import quantize
        >>> weight = quantize(torch.randn(16, 64), group_size=32, symmetric=False)
        >>> torch.equal(from_gptq(*to_gptq(weight)).packed, weight.packed)
        True
    """
    if weight.strategy not in ("channel", "group"):
        raise ValueError(f"weight must have groups of columns, got strategy {weight.strategy!r}")
    rows, columns = weight.shape
    for name, length in (("out_features", rows), ("in_features", columns)):
        _check_whole_words("weight", name, length, 32 // weight.bits)
    table = zero_points(weight)
    zero_point = torch.zeros_like(weight.scale, dtype=torch.int8) if table is None else table
    low, _ = code_range(weight.bits)
    if zero_plus_one and bool((zero_point == low).any()):
        raise ValueError(
            f"zero_point must be above {low} in a GPTQ file of version 1, which stores "
            f"zero_point - {low} - 1, got {low}"
        )
    g_idx = scale_columns(weight).to(torch.int32)
    _check_groups(g_idx, weight.scale.shape[1])
    return GPTQTensors(
        weight.packed.T.contiguous(),
        pack(zero_point.T.contiguous() - int(zero_plus_one), bits=weight.bits),
        weight.scale.T.contiguous(),
        g_idx,
    )


def _read_zero_points(
    qzeros: Tensor, rows: int, bits: int, zero_plus_one: bool, symmetric: bool
) -> Tensor:
    """Return the signed zero-points, int8 ``[groups, out_features]``, after checking them."""
    stored = unpack(qzeros, rows, bits=bits)
    zero_point = stored + int(zero_plus_one)
    if qzeros.is_meta:
        return zero_point
    low, high = code_range(bits)
    too_large = (stored == high).nonzero()
    if zero_plus_one and len(too_large):
        raise ValueError(
            f"qzeros must be below {high - low} in a GPTQ file of version 1, where it means the "
            f"zero-point {2**bits}, which {bits} bits do not hold, got {high - low} at "
            f"{too_large[0].tolist()}; a file of version 2 (gptq_v2) stores zero-points as they are"
        )
    if symmetric:
        check_symmetric(zero_point, bits)
    return zero_point


def _check_whole_words(name: str, length_name: str, length: int, per_word: int) -> None:
    if length % per_word or not length:
        raise ValueError(
            f"{name} must have {length_name} in words of {per_word}, got {length_name} = {length}"
        )


def _check_groups(g_idx: Tensor, groups: int) -> None:
    """Check that g_idx names groups, and that tools agree on its meaning."""
    if g_idx.is_meta:
        return
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        value = low if low < 0 else high
        raise ValueError(f"g_idx must be in [0, {groups}), the groups of scales, got {value}")
    if groups > 1 and high == 0:
        raise ValueError(
            f"g_idx must name more than the first of {groups} groups, got zeros only: some tools "
            "read that as groups in column order"
        )


def _in_column_order(g_idx: Tensor, groups: int) -> bool:
    """Return whether g_idx numbers groups of equal size from left to right."""
    columns = len(g_idx)
    if columns % groups or g_idx.is_meta:
        return False
    in_order = torch.arange(columns, device=g_idx.device) // (columns // groups)
    return torch.equal(g_idx.to(torch.int64), in_order)
