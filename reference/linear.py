"""The forward pass: an INT4 base weight, and an adapter for each token on top of it.

y = RN_x( x W^T + scaling * (x A^T) B^T + bias )

RN_x rounds once, to the dtype of x. Everything inside is summed in float32 (float64 when x is
float64), the shrink included; W is the weight after its own single rounding.

Source: ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from int4_lora.reference.checks import (
    ID_DTYPES,
    X_DTYPES,
    check_adapter_ids,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.dequantization import linear_weight
from int4_lora.reference.float4_weight import BaseWeight, check_weight
from int4_lora.reference.lora import (
    accumulation_dtype,
    check_accumulates,
    expand,
    shrink,
    without_autocast,
)
from int4_lora.reference.lora_stack import (
    LoRASlice,
    LoRAStack,
    PackedLoRAStack,
    check_slices_fit,
)

__all__ = ["as_slices", "check_operands", "check_slices", "int4_linear", "int4_lora_linear"]


def int4_linear(x: Tensor, weight: BaseWeight, bias: Tensor | None = None) -> Tensor:
    """Apply an INT4 linear layer: ``y = RN_x(x W^T + bias)``.

    Args:
        x: ``[tokens, in_features]``, float16, bfloat16, float32 or float64; tokens may be 0.
        weight: the packed base weight, INT4 or FP4.
        bias: ``[out_features]``, float, or None.

    Returns:
        ``[tokens, out_features]`` in the dtype of x.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape or device does not fit.

    Example:
        >>> from int4_lora.reference import PackedWeight
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> int4_linear(torch.eye(8)[:2], weight)
        tensor([[-4.0000],
                [-3.5000]])

    Source:
        ``docs/numerics.md``.
    """
    return int4_lora_linear(x, weight, bias=bias)


def int4_lora_linear(
    x: Tensor,
    weight: BaseWeight,
    lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice] | None = None,
    adapter_ids: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply an INT4 linear layer with an adapter for each token.

    ``y = RN_x(x W^T + scaling * (x A^T) B^T + bias)``, where A, B and scaling are those of the
    token's adapter; the id -1 has no such term. It is differentiable in x, and in a and b of the
    adapters.

    Args:
        x: ``[tokens, in_features]``, float16, bfloat16, float32 or float64; tokens may be 0.
        weight: the packed base weight, INT4 or FP4.
        lora: adapters of the whole output, slices that do not overlap, or None. Of adapters in INT4
            the dequantised A and B are used.
        adapter_ids: int32 or int64 ``[tokens]``, each in ``[-1, adapters)``; needed with ``lora``.
        bias: ``[out_features]``, float, or None.

    Returns:
        ``[tokens, out_features]`` in the dtype of x.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.

    Example:
        >>> from int4_lora.reference import PackedWeight
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> lora = LoRAStack.stack([(torch.ones(1, 8), torch.ones(1, 1), 0.25)])
        >>> int4_lora_linear(torch.ones(2, 8), weight, lora, torch.tensor([0, -1]))
        tensor([[-12.],
                [-14.]])

    Source:
        ``docs/numerics.md``; arXiv:2106.09685.
    """
    slices, ids = check_operands(x, weight, lora, adapter_ids, bias)
    accumulate = accumulation_dtype(x)
    with without_autocast(x):
        y = x.to(accumulate) @ linear_weight(weight, accumulate).T  # [tokens, out_features]
    for part in slices:
        delta = expand(shrink(x, part.stack, ids), part.stack, ids)  # [tokens, part]
        y = y + pad(delta, (part.start, weight.out_features - part.stop))
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(x.dtype)


def as_slices(
    lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice] | None,
) -> tuple[LoRASlice, ...]:
    """Return ``lora`` as slices: none for None, one from output 0 for a stack, or those given.

    Adapters in INT4 are dequantised.

    Raises:
        TypeError: ``lora`` is neither None, a LoRAStack nor a sequence of LoRASlice.
        ValueError: the slices do not hold the same number of adapters.
    """
    if lora is None:
        return ()
    if isinstance(lora, PackedLoRAStack):
        lora = lora.dequantize()
    if isinstance(lora, LoRAStack):
        return (LoRASlice(lora, start=0),)
    if not isinstance(lora, (list, tuple)):
        raise TypeError(f"lora must be a LoRAStack or LoRASlices, got {type(lora).__name__}")
    for index, part in enumerate(lora):
        if not isinstance(part, LoRASlice):
            raise TypeError(f"lora[{index}] must be a LoRASlice, got {type(part).__name__}")
        if part.stack.adapters != lora[0].stack.adapters:
            raise ValueError(
                f"all slices must hold as many adapters: lora[0] has {lora[0].stack.adapters}, "
                f"lora[{index}] has {part.stack.adapters}"
            )
    return tuple(lora)


def check_slices(
    weight: BaseWeight, lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice] | None
) -> tuple[LoRASlice, ...]:
    """Check that ``lora`` fits ``weight``; return it as slices.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: widths that do not fit, slices that overlap or leave the output.
    """
    check_weight(weight)
    slices = as_slices(lora)
    for part in slices:
        check_one_device(weight=weight.packed, lora=part.stack.a)
    placed = [(part.stack.a, part.start, part.stop) for part in slices]
    check_slices_fit(placed, weight.in_features, weight.out_features, "weight")
    whole = isinstance(lora, (LoRAStack, PackedLoRAStack))
    if whole and slices[0].stop != weight.out_features:
        raise ValueError(
            f"lora must have the out_features of weight, {weight.out_features}, "
            f"got b of {list(slices[0].stack.b.shape)}"
        )
    return slices


def check_operands(
    x: Tensor,
    weight: BaseWeight,
    lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice] | None,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> tuple[tuple[LoRASlice, ...], Tensor]:
    """Check all operands; return the slices, and the ids: all -1 where none are given.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.
    """
    slices = check_slices(weight, lora)
    check_dtype("x", x, X_DTYPES)
    check_shape("x", x, (None, weight.in_features), "[tokens, in_features]")
    for part in slices:
        check_accumulates("a and b of lora", part.stack.a, x)
    if bias is not None:
        check_dtype("bias", bias, X_DTYPES)
        check_shape("bias", bias, (weight.out_features,), "[out_features]")
        check_accumulates("bias", bias, x)
    check_one_device(x=x, weight=weight.packed, bias=bias)
    if adapter_ids is None:
        if slices:
            raise ValueError("adapter_ids must be given with lora, got None")
        return slices, torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    adapters = slices[0].stack.adapters if slices else 0
    check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
    check_one_device(x=x, adapter_ids=adapter_ids)
    check_adapter_ids(adapter_ids, x.shape[0], adapters)
    return slices, adapter_ids
