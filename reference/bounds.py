"""How far a right kernel may be from the exact result, derived and not tuned.

With unit roundoff u, a sum of n products in any order errs by at most gamma_n = n u / (1 - n u)
times the sum of their magnitudes. Counting the roundings of the declared order, with K =
in_features, r = rank, and j the additions that join base, delta and bias:

======================================  =================================================
what is summed                          at most
======================================  =================================================
base and bias                           gamma_(K + r + j) (|x| |W|^T + |bias|)
delta (+2: scaling cast and multiplied) gamma_(K + r + 2 + j) |scaling| (|x| |A|^T) |B|^T
the exact result's own float64 sums     the same with u = 2^-53
======================================  =================================================

r is 0 without adapters. To these come what the backend declares:

- ``weight_rounded=False``, (q - z) * s is not rounded to the scale's dtype: the distance
  |x (W' - W)^T| between the two exact results, and two more roundings of each product (the
  weight in the accumulation dtype, or the scale applied to a partial sum);
- ``base_rounded=True``, the base is rounded to the dtype of x before the delta is added: one
  rounding of x W^T + bias;

then the last rounding to the dtype of x, and underflow: a product may lose the smallest normal
number of a wide-range format (kernels flush to zero) or half the smallest subnormal of float16.
Where a sum or the result can overflow no error is too large, and the bound is infinite.

Source: N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from int4_lora.reference.checks import X_DTYPES, check_dtype
from int4_lora.reference.dequantization import (
    centred_codes,
    dequantize,
    scale_of_each_weight,
)
from int4_lora.reference.linear import check_slices, int4_lora_linear
from int4_lora.reference.lora import expand, shrink
from int4_lora.reference.lora_stack import LoRASlice, LoRAStack
from int4_lora.reference.packed_weight import PackedWeight

__all__ = ["error_bound"]


@dataclass(frozen=True)
class Format:
    """What rounding to a float format can lose.

    Args:
        u: unit roundoff, relative to the result.
        product_underflow: what one product can lose when it underflows.
        output_underflow: what one rounded result can lose when it underflows.
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


def error_bound(
    x: Tensor,
    weight: PackedWeight,
    lora: LoRAStack | Sequence[LoRASlice] | None = None,
    adapter_ids: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    accumulate: torch.dtype = torch.float32,
    weight_rounded: bool = True,
    base_rounded: bool = False,
) -> Tensor:
    """Bound ``|y - exact|`` of a backend that computes ``int4_lora_linear`` as it declares.

    ``exact`` is ``int4_lora_linear(x.double(), ...)``, computed on the CPU. The formula stands
    at the top of the module.

    Args:
        x: ``[tokens, in_features]``, as in ``int4_lora_linear``.
        weight: the packed base weight.
        lora: adapters, slices, or None.
        adapter_ids: ``[tokens]``, or None without adapters.
        bias: ``[out_features]``, or None.
        accumulate: the dtype that sums are kept in; float64 if x is float64. For float16 or
            bfloat16 operands on a CUDA device float32 has u = 2^-23, since tensor cores truncate.
        weight_rounded: whether (q - z) * s is rounded to the scale's dtype before use.
        base_rounded: whether the base is rounded to the dtype of x before the delta is added.

    Returns:
        float64 ``[tokens, out_features]``, in the units of y: infinite where an overflow or a
        sum too long for ``accumulate`` leaves no bound, and where the exact result is not finite
        (then compare its class: NaN with NaN, infinity with infinity).

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.

    Example:
        >>> packed = torch.tensor([[-162254320]], dtype=torch.int32)
        >>> weight = PackedWeight(packed, torch.tensor([[0.5]]), shape=(1, 8))
        >>> error_bound(torch.ones(1, 8), weight).item() < 2**-24 * 8 * 21.1
        True

    Source:
        Higham, section 3.1; the roundings are those of ``docs/numerics.md``.
    """
    check_dtype("x", x, X_DTYPES)
    if accumulate not in X_DTYPES:
        raise TypeError(f"accumulate must be a float dtype, got {accumulate}")
    slices = check_slices(weight, lora)
    exact = int4_lora_linear(x.to(torch.float64), weight, lora, adapter_ids, bias)
    output = FORMATS[x.dtype]
    inside = FORMATS[torch.float64 if x.dtype == torch.float64 else accumulate]
    u = inside.u
    if x.is_cuda and accumulate == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        u = TENSOR_CORE_U

    size = x.abs().to(torch.float64)
    used = dequantize(weight, torch.float64) if weight_rounded else _unrounded(weight)
    base_sum = size @ used.abs().T  # [tokens, out_features]
    if bias is not None:
        base_sum = base_sum + bias.abs().to(torch.float64)
    delta_sum, delta_scale = _delta_magnitudes(size, slices, adapter_ids, exact)

    rank = max((part.stack.rank for part in slices), default=0)
    joins = (bias is not None) + (len(slices) > 0)
    n = weight.in_features + rank + joins + (0 if weight_rounded else 2)
    error = _gamma(n, u) * base_sum + _gamma(n + 2, u) * delta_sum
    error = error + _gamma(n + 2, FORMATS[torch.float64].u) * (base_sum + delta_sum)
    error = error + inside.product_underflow * (n + weight.in_features * delta_scale)
    if not weight_rounded:
        error = error + (x.to(torch.float64) @ (used - dequantize(weight, torch.float64)).T).abs()
    if base_rounded:
        base = int4_lora_linear(x.to(torch.float64), weight, bias=bias).abs() + error
        error = error + output.u * base + output.output_underflow
        error = torch.where(base >= output.overflow, torch.inf, error)
    if output.u > inside.u:
        error = error + output.u * (exact.abs() + error) + output.output_underflow
    overflows = (base_sum + delta_sum + error >= inside.overflow) | (
        exact.abs() + error >= output.overflow
    )
    unbounded = overflows | error.isnan() | ~exact.isfinite()
    return torch.where(unbounded, torch.inf, error)


def _gamma(n: int, u: float) -> float:
    return n * u / (1 - n * u) if n * u < 1 else float("inf")


def _unrounded(weight: PackedWeight) -> Tensor:
    """Return (q - z) * s exactly: float64 ``[out_features, in_features]``."""
    return centred_codes(weight).to(torch.float64) * scale_of_each_weight(weight).to(torch.float64)


def _delta_magnitudes(
    size: Tensor,
    slices: tuple[LoRASlice, ...],
    adapter_ids: Tensor | None,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return |scaling| (|x| |A|^T) |B|^T and |scaling| sum |B|: ``[tokens, out_features]``."""
    delta_sum, delta_scale = torch.zeros_like(like), torch.zeros_like(like)
    for part in slices:
        if adapter_ids is None:
            break  # int4_lora_linear has refused this already
        stack = part.stack
        sizes = LoRAStack(stack.a.abs(), stack.b.abs(), stack.scaling.abs())
        shrunk = shrink(size, sizes, adapter_ids)
        ones = torch.ones_like(shrunk)
        delta_sum[:, part.start : part.stop] = expand(shrunk, sizes, adapter_ids)
        delta_scale[:, part.start : part.stop] = expand(ones, sizes, adapter_ids)
    return delta_sum, delta_scale
