"""Put the stored tensors of a module together as one ``PackedWeight``, or find its missing shape.

Source: ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from int4_lora.integration.checkpoint.scheme import Scheme, check_strategy
from int4_lora.reference import PackedWeight

__all__ = ["assemble", "shape_that_fits"]


def assemble(scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
    """Return the packed weight of a module, or of some of its rows.

    Args:
        scheme: how the module is quantised.
        tensors: its tensors, by the last part of their names. One scale for the whole tensor, and
            its zero-point, may have the shape [].
        shape: ``(out_features, in_features)``.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: tensors contradict each other or the config.
    """
    one = {
        part: tensor.reshape(1)
        for part, tensor in tensors.items()
        if part in ("weight_scale", "weight_zero_point") and scheme.strategy == "tensor"
        if tensor.ndim == 0
    }
    tensors = {**tensors, **one}
    weight = PackedWeight(
        packed=tensors["weight_packed"],
        scale=tensors["weight_scale"],
        shape=shape,
        zero_point=tensors.get("weight_zero_point"),
        g_idx=tensors.get("weight_g_idx"),
        group_size=scheme.group_size,
        bits=scheme.bits,
    )
    check_strategy(scheme, weight)
    return weight


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
