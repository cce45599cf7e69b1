"""Put the stored tensors of a module together as one ``PackedWeight``, or find its missing shape.

Source: ``docs/format.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from int4_lora.integration.checkpoint.layouts import (
    AWQ,
    GPTQ,
    GPTQ_V2,
    INT_QUANTIZED,
    LAYOUTS,
    PACK_QUANTIZED,
)
from int4_lora.integration.checkpoint.scheme import Scheme, check_strategy
from int4_lora.reference import PackedWeight, from_awq, from_gptq, pack, unpack
from int4_lora.reference.checks import check_dtype, check_shape
from int4_lora.reference.dequantization import zero_points

__all__ = ["assemble", "columns", "shape_that_fits", "stored_parts"]


def assemble(
    scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None
) -> PackedWeight:
    """Return the packed weight of a module, or of some of its outputs.

    Args:
        scheme: how the module is quantised.
        tensors: its tensors, by the last part of their names. In pack-quantized, one scale for the
            whole tensor, and its zero-point, may have the shape [].
        shape: ``(out_features, in_features)``; needed for pack-quantized only. The tensors of the
            other layouts tell it.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other or the config.
    """
    if scheme.format == AWQ:
        stored = (tensors[part] for part in ("qweight", "qzeros", "scales"))
        weight = from_awq(*stored, symmetric=scheme.symmetric)
    elif scheme.format in (GPTQ, GPTQ_V2):
        weight = _from_gptq(scheme, tensors)
    elif LAYOUTS.get(scheme.format) is INT_QUANTIZED:
        weight = _int_quantized(scheme, tensors)
    else:
        weight = _pack_quantized(scheme, tensors, shape)
    check_strategy(scheme, weight)
    if scheme.format in (AWQ, GPTQ, GPTQ_V2) and scheme.group_size is not None:
        weight = dataclasses.replace(weight, group_size=scheme.group_size)  # checks it
    return weight


def stored_parts(scheme: Scheme, weight: PackedWeight) -> dict[str, Tensor]:
    """Return the codes, scales and zero-points of a weight as compressed-tensors stores them.

    Args:
        scheme: how the module is quantised; its format is pack-quantized, or one that stores a byte
            for each code.
        weight: a weight, or rows of one.

    Returns:
        The tensors by the last part of their names; without zero-points if the weight has none.
    """
    if LAYOUTS.get(scheme.format, PACK_QUANTIZED) is PACK_QUANTIZED:
        codes, zero_point = weight.packed, weight.zero_point
    else:
        codes, zero_point = unpack(weight.packed, weight.in_features, bits=weight.bits), None
        if (zeros := zero_points(weight)) is not None:
            zero_point = zeros.reshape(weight.scale.shape)
    parts = {LAYOUTS.get(scheme.format, PACK_QUANTIZED).codes: codes, "weight_scale": weight.scale}
    return parts if zero_point is None else {**parts, "weight_zero_point": zero_point}


def columns(
    scheme: Scheme, tensors: Mapping[str, Tensor], start: int, stop: int
) -> dict[str, Tensor]:
    """Return the tensors of the outputs ``[start, stop)`` of a module in GPTQ's or AWQ's layout.

    Args:
        scheme: how the module is quantised.
        tensors: its tensors, by the last part of their names.
        start: the first output, a multiple of the codes in a word.
        stop: the output after the last, likewise.
    """
    per_word = 32 // scheme.bits
    words = slice(start // per_word, stop // per_word)
    cuts = {
        "qweight": words if scheme.format == AWQ else slice(start, stop),
        "qzeros": words,
        "scales": slice(start, stop),
    }
    return {
        part: tensor[:, cuts[part]] if part in cuts else tensor for part, tensor in tensors.items()
    }


def shape_that_fits(scheme: Scheme, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the only shape for which a module's tensors and the config agree.

    The last word of a row may be padded, so a row of w words may have 32 / bits different widths.

    Args:
        scheme: how the module is quantised.
        tensors: its tensors, by the last part of their names; their values are not read.

    Raises:
        ValueError: no width fits, or several do.
    """
    described = {part: tensor.to("meta") for part, tensor in tensors.items()}
    packed = described["weight_packed"]
    if packed.ndim != 2 or not packed.numel():
        raise ValueError(
            f"weight_shape is missing, and packed must be [out_features, words], "
            f"got {list(packed.shape)}"
        )
    rows, words = packed.shape
    per_word = 32 // scheme.bits
    fitting, why = [], ""
    for columns in range((words - 1) * per_word + 1, words * per_word + 1):
        try:
            assemble(scheme, described, (rows, columns))
        except (TypeError, ValueError) as error:
            why = str(error)
        else:
            fitting.append(columns)
    if len(fitting) == 1:
        return rows, fitting[0]
    if fitting:
        raise ValueError(
            "weight_shape is missing, and in_features may be any of "
            f"{', '.join(map(str, fitting))} by the config and the other tensors"
        )
    raise ValueError(
        f"weight_shape is missing, and no in_features up to {words * per_word} fits: for "
        f"{words * per_word}, {why}"
    )


def _flat(scheme: Scheme, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the one scale of a tensor, and its zero-point, in the shape [1]."""
    return {
        part: tensor.reshape(1)
        if part in ("weight_scale", "weight_zero_point")
        and scheme.strategy == "tensor"
        and tensor.ndim == 0
        else tensor
        for part, tensor in tensors.items()
    }


def _int_quantized(scheme: Scheme, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Pack the codes, and the zero-points where a packed weight has them packed."""
    tensors = _flat(scheme, tensors)
    codes, zero_point = tensors["weight"], tensors.get("weight_zero_point")
    check_dtype("weight", codes, (torch.int8,))
    check_shape("weight", codes, (None, None), "[out_features, in_features]")
    if zero_point is not None and scheme.strategy in ("channel", "group"):
        check_dtype("weight_zero_point", zero_point, (torch.int8,))
        scale_shape = tuple(tensors["weight_scale"].shape)
        check_shape("weight_zero_point", zero_point, scale_shape, "the shape of weight_scale")
        zero_point = pack(zero_point, bits=scheme.bits, dim=0)
    return PackedWeight(
        packed=pack(codes, bits=scheme.bits),
        scale=tensors["weight_scale"],
        shape=(codes.shape[0], codes.shape[1]),
        zero_point=zero_point,
        g_idx=tensors.get("weight_g_idx"),
        group_size=scheme.group_size,
        bits=scheme.bits,
    )


def _pack_quantized(
    scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None
) -> PackedWeight:
    if shape is None:
        raise ValueError("weight_shape is missing")
    tensors = _flat(scheme, tensors)
    return PackedWeight(
        packed=tensors["weight_packed"],
        scale=tensors["weight_scale"],
        shape=shape,
        zero_point=tensors.get("weight_zero_point"),
        g_idx=tensors.get("weight_g_idx"),
        group_size=scheme.group_size,
        bits=scheme.bits,
    )


def _from_gptq(scheme: Scheme, tensors: Mapping[str, Tensor]) -> PackedWeight:
    g_idx = tensors.get("g_idx")
    weight = from_gptq(
        tensors["qweight"],
        tensors["qzeros"],
        tensors["scales"],
        g_idx,
        zero_plus_one=scheme.format == GPTQ,
        symmetric=scheme.symmetric,
        bits=scheme.bits,
    )
    kept = weight.g_idx
    if scheme.actorder is None and kept is not None and not kept.is_meta:
        size = scheme.group_size if isinstance(scheme.group_size, int) else weight.in_features
        if not torch.equal(kept.to(torch.int64), torch.arange(weight.in_features) // size):
            raise ValueError(
                "g_idx must number the groups in column order where config.json says desc_act "
                "false: some tools read it, others do not"
            )
    return weight
