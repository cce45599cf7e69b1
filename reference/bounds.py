"""How far a correct kernel may be from the exact result: derived, not tuned.

With unit roundoff u, a sum of n products in any order errs by at most gamma_n = n u / (1 - n u)
times the sum of their magnitudes. Counting the roundings of the declared order, with K =
in_features, r = the rank that reaches an output (0 without an adapter), and j the additions that
join base, delta and bias:

======================================  =================================================
what is summed                          at most
======================================  =================================================
base and bias                           gamma_(K + r + j) (|x| |W|^T + |bias|)
delta (+2: scaling cast and multiplied) gamma_(K + r + 2 + j) |scaling| (|x| |A|^T) |B|^T
the exact result's own float64 sums     the same with u = 2^-53
======================================  =================================================

The scaling may be multiplied into x A^T, into B or into the delta. Add what the backend declares:

- ``weight_rounded=False``, (q - z) * s is not rounded to the scale's dtype: the distance
  |x (W' - W)^T| between the two exact results, and two more roundings of each product (the
  weight is held in the accumulation dtype, or the scale is applied to a partial sum);
- an FP4 weight is unrounded in the truth: the distance is added where it is rounded, and one more
  rounding where it is not, since its scale is a quotient;
- ``base_rounded=True``, the base is rounded to the dtype of x before the delta is added: one
  rounding of x W^T, and one of x W^T + bias, since opaque kernels round before or after the bias
  or both;

then the last rounding to the dtype of x, and underflow: a product may lose the smallest normal
number of a wide-range format (results may be flushed to zero) or half the smallest subnormal of
float16; subnormal operands may not be flushed. Where a sum, an intermediate product or the result
can overflow, the bound is infinite.

Source: N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference.checks import X_DTYPES
from int4_lora.reference.dequantization import (
    centred_codes,
    exact_weight,
    rounded_weight,
    scale_of_each_weight,
    unrounded_weight,
)
from int4_lora.reference.float4_weight import BaseWeight, Float4Weight
from int4_lora.reference.linear import check_operands, int4_lora_linear
from int4_lora.reference.lora import expand, shrink
from int4_lora.reference.lora_stack import LoRASlice, LoRAStack, PackedLoRAStack

__all__ = [
    "FORMATS",
    "Format",
    "LayerSums",
    "Sums",
    "check_declared",
    "error_bound",
    "gamma",
    "layer_sums",
]


@dataclass(frozen=True)
class Format:
    """What rounding to a float format loses at most.

    Args:
        u: unit roundoff, relative to the result.
        product_underflow: the loss of a product that underflows.
        output_underflow: the loss of a rounded result that underflows.
        overflow: the smallest magnitude that rounds to infinity.
    """

    u: float
    product_underflow: float
    output_underflow: float
    overflow: float


FORMATS = {
    torch.float16: Format(2.0**-11, 2.0**-25, 2.0**-25, 65520.0),
    torch.bfloat16: Format(2.0**-8, 2.0**-126, 2.0**-134, (2 - 2.0**-8) * 2.0**127),
    torch.float32: Format(2.0**-24, 2.0**-126, 2.0**-150, (2 - 2.0**-24) * 2.0**127),
    torch.float64: Format(2.0**-53, 2.0**-1022, 0.0, float("inf")),
}
TENSOR_CORE_U = 2.0**-23  # NVIDIA's tensor cores truncate where they align partial sums


@torch.no_grad()
def error_bound(
    x: Tensor,
    weight: BaseWeight,
    lora: LoRAStack | PackedLoRAStack | Sequence[LoRASlice] | None = None,
    adapter_ids: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
    weight_rounded: bool = True,
    base_rounded: bool = False,
) -> Tensor:
    """Bound ``|y - exact|`` of a backend that computes ``int4_lora_linear`` as it declares.

    ``exact`` is ``int4_lora_linear(x.double(), ...)``. The module's docstring gives the formula.

    Args:
        x: ``[tokens, in_features]``, as in ``int4_lora_linear``.
        weight: the packed base weight, INT4 or FP4.
        lora: adapters, slices, or None.
        adapter_ids: ``[tokens]``, or None without adapters.
        bias: ``[out_features]``, or None.
        accumulate: the dtype of the sums; float64 if x is float64. Wider operands are used as they
            are: rounding them to this dtype is not covered. For float16 or bfloat16 operands on a
            CUDA device float32 has u = 2^-23, since tensor cores truncate: pass the operands on
            the backend's device.
        weight_rounded: whether (q - z) * s is rounded to the scale's dtype before use, or an FP4
            weight to bfloat16.
        base_rounded: whether the base is rounded to the dtype of x before bias or delta is added.

    Returns:
        float64 ``[tokens, out_features]``, in the units of y. It is infinite where something may
        overflow, where a sum is too long for ``accumulate``, and where the exact result is not
        finite (then compare classes: NaN with NaN, infinity with infinity).

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.

    Example:
        >>> from int4_lora.reference import PackedWeight
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> error_bound(torch.ones(1, 8), weight).item() < 2**-24 * 8 * 21.1
        True

    Source:
        Higham, section 3.1; the roundings are those of ``docs/numerics.md``.
    """
    check_declared(accumulate, weight_rounded=weight_rounded, base_rounded=base_rounded)
    slices, ids = check_operands(x, weight, lora, adapter_ids, bias)
    exact = int4_lora_linear(x.to(torch.float64), weight, lora, adapter_ids, bias)
    sums = Sums.of(x, accumulate)
    inside, output = sums.inside, FORMATS[x.dtype]
    layer = layer_sums(x, weight, slices, ids, bias, sums=sums, weight_rounded=weight_rounded)
    error, largest = layer.error, layer.largest
    if base_rounded:
        for added in (None, bias) if bias is not None else (None,):
            rounded = int4_lora_linear(x.to(torch.float64), weight, bias=added).abs() + error
            error = error + output.u * rounded + output.output_underflow
            largest = torch.where(rounded >= output.overflow, torch.inf, largest)
    if sums.dtype != x.dtype:
        error = error + output.u * (exact.abs() + error) + output.output_underflow
    unbounded = (largest + error >= inside.overflow) | (exact.abs() + error >= output.overflow)
    return torch.where(unbounded | error.isnan() | ~exact.isfinite(), torch.inf, error)


def check_declared(accumulate: object, **flags: object) -> None:
    """Check the roundings that a backend declares.

    Raises:
        TypeError: ``accumulate`` is no float dtype, or a flag is no bool.
    """
    if accumulate not in X_DTYPES:
        raise TypeError(f"accumulate must be a float dtype, got {accumulate}")
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise TypeError(f"{name} must be a bool, got {type(flag).__name__}")


@dataclass(frozen=True)
class Sums:
    """How sums are kept.

    Args:
        dtype: the dtype of the sums.
        u: its unit roundoff, or that of tensor cores.
    """

    dtype: torch.dtype
    u: float

    @classmethod
    def of(cls, x: Tensor, accumulate: torch.dtype) -> Sums:
        """Return how sums over x are kept: in float64 if x is float64, else in ``accumulate``."""
        if x.dtype == torch.float64:
            return cls(torch.float64, FORMATS[torch.float64].u)
        if x.is_cuda and accumulate == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
            return cls(accumulate, TENSOR_CORE_U)
        return cls(accumulate, FORMATS[accumulate].u)

    @property
    def inside(self) -> Format:
        """What rounding to the dtype of the sums loses."""
        return FORMATS[self.dtype]


@dataclass(frozen=True, eq=False)
class LayerSums:
    """What the sums of a layer lose before any rounding to the dtype of x, and how large they get.

    Args:
        error: float64 ``[tokens, out_features]``, as are all of these.
        largest: the largest number on the way, which must not overflow.
        magnitude: the sum of the magnitudes of all products.
        delta: the part of ``magnitude`` that adapters add.
    """

    error: Tensor
    largest: Tensor
    magnitude: Tensor
    delta: Tensor


def layer_sums(
    x: Tensor,
    weight: BaseWeight,
    slices: tuple[LoRASlice, ...],
    ids: Tensor,
    bias: Tensor | None = None,
    *,
    sums: Sums,
    weight_rounded: bool = True,
    slack: Tensor | None = None,
    joins: int = 0,
) -> LayerSums:
    """Bound the sums of a layer; the module's docstring gives the formula.

    Args:
        x: ``[tokens, in_features]``, the exact input.
        weight: the packed base weight, INT4 or FP4.
        slices: the adapters.
        ids: ``[tokens]``, in ``[-1, adapters)``.
        bias: ``[out_features]``, or None.
        sums: how sums are kept.
        weight_rounded: whether (q - z) * s is rounded to the scale's dtype before use.
        slack: ``[tokens, in_features]``, how far the input that the backend has may be from x; None
            if it has x itself. The error then includes what this distance makes of the result.
        joins: further additions and products in which the results of the layer take part.
    """
    inside, is_fp4 = sums.inside, isinstance(weight, Float4Weight)
    size = x.abs().to(torch.float64)
    size = size if slack is None else size + slack
    truth = exact_weight(weight)
    used = truth if x.dtype == torch.float64 else rounded_weight(weight).to(torch.float64)
    used = used if weight_rounded else unrounded_weight(weight)
    base = size @ used.abs().T  # [tokens, out_features]
    largest, lost = (base, torch.zeros_like(base)) if weight_rounded else _unscaled(size, weight)
    if bias is not None:
        base = base + bias.abs().to(torch.float64)
    delta = _delta_magnitudes(size, slices, ids, base)
    largest = torch.stack([largest, base + delta.sum, delta.largest]).amax(dim=0)

    n = weight.in_features + delta.rank + (delta.rank > 0) + (bias is not None) + joins
    n = n + (0 if weight_rounded else 3 if is_fp4 else 2)  # the scale of FP4 is a quotient
    error = gamma(n, sums.u) * base + gamma(n + 2, sums.u) * delta.sum
    error = error + gamma(n + 2, FORMATS[torch.float64].u) * (base + delta.sum)
    error = error + inside.product_underflow * (n + delta.underflows + lost)
    if weight_rounded is is_fp4:  # the truth may have another weight
        distance = used - truth
        error = error + (x.to(torch.float64) @ distance.T).abs()
        error = error if slack is None else error + slack @ distance.abs().T
    if slack is not None:
        error = error + slack @ truth.abs().T
        error = error + _delta_magnitudes(slack, slices, ids, base).sum
    return LayerSums(error, largest, base + delta.sum, delta.sum)


def gamma(n: Tensor | int, u: float) -> Tensor:
    """Return gamma_n = n u / (1 - n u) in float64, infinite where n u is 1 or more."""
    nu = torch.as_tensor(n, dtype=torch.float64) * u
    return torch.where(nu < 1, nu / (1 - nu), torch.inf)


def _unscaled(size: Tensor, weight: BaseWeight) -> tuple[Tensor, Tensor]:
    """Return the largest intermediate number, and the factor by which underflow reaches the output.

    A backend may hold W' in the accumulation dtype, or multiply a sum of x (q - z) by the scale.
    """
    scale = scale_of_each_weight(weight).abs().to(torch.float64).amax(dim=1)  # [out_features]
    sums = size @ centred_codes(weight).abs().to(torch.float64).T
    held = torch.maximum(unrounded_weight(weight).abs().amax(dim=1), scale)
    lost = size.sum(dim=1, keepdim=True) + 2 * weight.in_features * scale
    return torch.maximum(sums, held), lost


@dataclass(frozen=True)
class _Delta:
    """Magnitudes of the delta, each float64 ``[tokens, out_features]``.

    Args:
        sum: |scaling| (|x| |A|^T) |B|^T.
        rank: the rank that reaches an output; 0 without an adapter.
        largest: the largest intermediate number, wherever the scaling is multiplied in.
        underflows: the factor by which the underflow of products reaches the output.
    """

    sum: Tensor
    rank: Tensor
    largest: Tensor
    underflows: Tensor


def _delta_magnitudes(
    size: Tensor, slices: tuple[LoRASlice, ...], ids: Tensor, like: Tensor
) -> _Delta:
    total, rank, largest, underflows = (torch.zeros_like(like) for _ in range(4))
    adapted = (ids >= 0)[:, None]  # [tokens, 1]
    for part in slices:
        columns = slice(part.start, part.stop)
        tensors = (part.stack.a, part.stack.b, part.stack.scaling)
        a, b, scaling = (tensor.abs().double() for tensor in tensors)
        unscaled_stack = LoRAStack(a, b, torch.ones_like(scaling))
        adapter_of_token = ids[:, None] == torch.arange(len(scaling), device=ids.device)
        scaling = torch.where(adapter_of_token, scaling, 0).sum(dim=1, keepdim=True)  # [tokens, 1]
        h = shrink(size, unscaled_stack, ids)  # [tokens, rank]
        h_sum = h.sum(dim=1, keepdim=True)
        unscaled = expand(h, unscaled_stack, ids)  # [tokens, part]
        b_sum = expand(torch.where(adapted, torch.ones_like(h), 0), unscaled_stack, ids)
        total[:, columns] = scaling * unscaled
        rank[:, columns] = torch.where(adapted, float(part.stack.rank), 0.0)
        scaled_first_or_last = scaling.clamp(min=1)
        reach = torch.maximum(unscaled, h_sum + b_sum) * scaled_first_or_last
        largest[:, columns] = torch.maximum(reach, scaling)
        before_scaling = size.shape[1] * b_sum + part.stack.rank
        within_scaling = unscaled + h_sum + b_sum
        underflows[:, columns] = scaling * before_scaling + within_scaling
    return _Delta(total, rank, largest, underflows)
