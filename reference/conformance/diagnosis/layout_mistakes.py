"""Mistakes in reading the tensors of GPTQ and AWQ, each a wrong ``layout`` step of a ``Way``.

Each returns the weight that the mistake reads. Operands of other functions are not changed.

Source: AutoGPTQ, whose versions store zero-points in two ways; AutoAWQ's order of the outputs;
``docs/format.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from int4_lora.reference import AWQTensors, GPTQTensors, PackedWeight, pack, unpack
from int4_lora.reference.awq import ORDER
from int4_lora.reference.conformance.cases.operands import Operands

__all__ = ["LAYOUT_MISTAKES"]

Layout = Callable[[Operands], PackedWeight | None]


def _order_ignored(*, words: bool, zeros: bool) -> Layout:
    """Return a step that takes the nibbles of AWQ's words in order, from the lowest."""
    return lambda operands: _awq(
        operands,
        _in_order if words else _in_awq_order,
        _in_order if zeros else _in_awq_order,
    )


def _order_inverted(operands: Operands) -> PackedWeight | None:
    """Apply the order in which AWQ packs once more, instead of its inverse."""
    return _awq(operands, _packed_again, _packed_again)


def _awq(
    operands: Operands, words: Callable[[Tensor], Tensor], zeros: Callable[[Tensor], Tensor]
) -> PackedWeight | None:
    tensors, weight = operands.layout, operands.packed_weight
    if not isinstance(tensors, AWQTensors) or weight is None:
        return weight
    return dataclasses.replace(
        weight,
        packed=pack(words(tensors.qweight).T),
        zero_point=pack(zeros(tensors.qzeros).T, dim=0),
    )


def _in_order(words: Tensor) -> Tensor:
    return unpack(words, 8 * words.shape[1])


def _in_awq_order(words: Tensor) -> Tensor:
    codes = torch.empty(words.shape[0], words.shape[1], 8, dtype=torch.int8)
    codes[:, :, ORDER] = _in_order(words).reshape(codes.shape)
    return codes.flatten(1)


def _packed_again(words: Tensor) -> Tensor:
    codes = _in_order(words).reshape(*words.shape, 8)
    return codes[:, :, ORDER].flatten(1)


def _other_version(operands: Operands) -> PackedWeight | None:
    """Read the zero-points of version 1 as those of version 2, or the other way round."""
    tensors, weight = operands.layout, operands.packed_weight
    if not isinstance(tensors, GPTQTensors) or weight is None:
        return weight
    stored = unpack(tensors.qzeros, weight.out_features).to(torch.int16) + 8
    read = stored if operands.zero_plus_one else stored + 1
    signed = (read % 16 - 8).to(torch.int8)  # some tools keep four bits: 16 becomes 0
    return dataclasses.replace(weight, zero_point=pack(signed.T, dim=0))


def _along_the_other_dimension(operands: Operands) -> PackedWeight | None:
    """Read AWQ's words as if packed along the inputs, GPTQ's as if along the outputs."""
    tensors, weight = operands.layout, operands.packed_weight
    if tensors is None or weight is None:
        return weight
    outputs, inputs = weight.shape
    if isinstance(tensors, GPTQTensors):
        codes = unpack(tensors.qweight.reshape(inputs, -1), outputs).T
        return dataclasses.replace(weight, packed=pack(codes))
    if inputs % 8:
        return weight
    return dataclasses.replace(weight, packed=tensors.qweight.reshape(-1, outputs).T.contiguous())


def _not_transposed(operands: Operands) -> PackedWeight | None:
    """Read the words as compressed-tensors' rows: ``[out_features, in_features / 8]``."""
    tensors, weight = operands.layout, operands.packed_weight
    if tensors is None or weight is None or weight.in_features % 8:
        return weight
    words = tensors.qweight.reshape(weight.out_features, -1)
    return dataclasses.replace(weight, packed=words)


LAYOUT_MISTAKES: dict[str, dict[str, Layout]] = {
    "awq_order_ignored": {
        "nibbles in order": _order_ignored(words=True, zeros=True),
        "nibbles of the codes in order": _order_ignored(words=True, zeros=False),
        "nibbles of the zero-points in order": _order_ignored(words=False, zeros=True),
        "the order of packing, not its inverse": _order_inverted,
    },
    "gptq_zero_plus_one": {"zero-points of the other version": _other_version},
    "packed_along_inputs": {
        "words read along the other dimension": _along_the_other_dimension,
        "words read as rows of outputs": _not_transposed,
    },
}
"""Every name, and what exactly is done wrong under it."""
