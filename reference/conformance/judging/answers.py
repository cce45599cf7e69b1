"""The exact answer of a call, and how far a correct backend may be from it.

==============  ==============================================  ===============================
function        exact answer                                    bound
==============  ==============================================  ===============================
pack, unpack    the reference's integers                        equal
dequantize,     the reference's bits                            equal, or u |w| where the backend
from_gptq,                                                      declares an unrounded weight
from_awq
int4_linear     the reference on float64 operands               ``error_bound``
int4_moe        the same                                        ``moe_error_bound``
shrink, expand  the same                                        gamma_n of the sums
==============  ==============================================  ===============================

Source: ``docs/numerics.md``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from int4_lora.reference import (
    dequantize,
    error_bound,
    expand,
    int4_lora_linear,
    int4_moe,
    moe_error_bound,
    pack,
    shrink,
    unpack,
)
from int4_lora.reference.bounds import FORMATS, gamma
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.dequantization import unrounded_weight
from int4_lora.reference.float4_weight import BaseWeight, dense_dtype
from int4_lora.reference.lora_stack import LoRAStack

__all__ = ["WEIGHTS", "Answer", "answer", "delta_magnitude", "exact_answer"]

T = TypeVar("T")
WEIGHTS = ("dequantize", "from_gptq", "from_awq")
DELTA_ROUNDINGS = 4  # of x A^T, of B and of the delta, and one for their products


@dataclass(frozen=True, eq=False)
class Answer:
    """The exact answer of a call and its bound.

    Args:
        exact: integers, a weight in its dtype, or float64 ``[tokens, width]``.
        dtype: the dtype that the result must have.
        bound: float64, of the shape of ``exact``: the largest allowed error; 0 for equality.
        loose: exact answers; a result may have the class (NaN, infinite, finite) of any of them.
        free: bool, of the shape of ``exact``, or None: where a partial sum may overflow, so that
            any result is allowed.
    """

    exact: Tensor
    dtype: torch.dtype
    bound: Tensor
    loose: tuple[Tensor, ...]
    free: Tensor | None = None

    def to_cpu(self) -> Answer:
        """Return the same answer with every tensor on the CPU."""
        return Answer(
            self.exact.to("cpu"),
            self.dtype,
            self.bound.to("cpu"),
            tuple(exact.to("cpu") for exact in self.loose),
            None if self.free is None else self.free.to("cpu"),
        )


def answer(function: str, operands: Operands, manifest: Manifest) -> Answer:
    """Return the answer of a call of ``function``, bounded at the declared roundings."""
    exact = exact_answer(function, operands.to("cpu")).to(operands.device)
    if function in ("pack", "unpack"):
        return Answer(exact, exact.dtype, torch.zeros(exact.shape, dtype=torch.float64), (exact,))
    if function in WEIGHTS:
        return _weight_answer(operands, manifest, exact)
    if function in ("shrink", "expand"):
        wide = torch.float64 if operands.activations.dtype == torch.float64 else torch.float32
        return Answer(exact, wide, _part_bound(function, operands, manifest, exact), (exact,))
    if function == "int4_moe":
        bound = _experts_bound(operands, manifest)
        return Answer(
            exact, operands.activations.dtype, bound, (exact,), _free(bound, exact, manifest)
        )
    x = operands.activations
    loose = [exact]
    if not manifest.weight_rounded:
        loose.append(_layer_on(unrounded_weight(_weight_of(operands)), operands))
    bound = error_bound(
        x,
        _weight_of(operands),
        operands.lora,
        operands.adapter_ids,
        operands.bias,
        accumulate=manifest.accumulate,
        weight_rounded=manifest.weight_rounded,
        base_rounded=manifest.base_rounded,
    )
    if manifest.delta_rounded and operands.slices:
        u = FORMATS[x.dtype].u
        bound = bound + DELTA_ROUNDINGS * u * delta_magnitude(operands).nan_to_num(nan=torch.inf)
    return Answer(exact, x.dtype, bound, tuple(loose), _free(bound, exact, manifest))


def _free(bound: Tensor, exact: Tensor, manifest: Manifest) -> Tensor | None:
    """Return where sums in a narrow dtype may overflow, or None for wide sums."""
    narrow = FORMATS[manifest.accumulate].overflow < FORMATS[torch.float32].overflow / 2
    return bound.isinf() & exact.isfinite() if narrow else None


def _experts_bound(operands: Operands, manifest: Manifest) -> Tensor:
    return moe_error_bound(
        operands.activations,
        _of(operands.experts),
        _of(operands.topk_ids),
        _of(operands.topk_weights),
        operands.experts_lora,
        operands.adapter_ids,
        activation=operands.activation,
        weights_first=operands.weights_first,
        accumulate=manifest.accumulate,
        weight_rounded=manifest.weight_rounded,
        steps_rounded=manifest.steps_rounded,
    )


def delta_magnitude(operands: Operands) -> Tensor:
    """Return |scaling| (|x| |A|^T) |B|^T: float64 ``[tokens, out_features]``."""
    x, ids, weight = operands.activations, _of(operands.adapter_ids), _weight_of(operands)
    total = torch.zeros(len(x), weight.out_features, dtype=torch.float64, device=x.device)
    for part in operands.slices:
        magnitudes = _magnitudes(part.stack)
        h = shrink(x.abs().double(), magnitudes, ids)
        total[:, part.start : part.stop] = expand(h, magnitudes, ids)
    return total


def _magnitudes(stack: LoRAStack) -> LoRAStack:
    return LoRAStack(stack.a.abs().double(), stack.b.abs().double(), stack.scaling.abs().double())


def exact_answer(function: str, operands: Operands) -> Tensor:
    """Return the reference's answer on float64 operands: integers, a weight, or float64."""
    if function == "pack":
        return pack(_of(operands.codes), dim=operands.dim)
    if function == "unpack":
        return unpack(_of(operands.packed), operands.size, dim=operands.dim)
    if function in WEIGHTS:
        return dequantize(_weight_of(operands), operands.dtype)
    wide = operands.activations.to(torch.float64)
    if function == "shrink":
        return shrink(wide, operands.slices[0].stack, _of(operands.adapter_ids))
    if function == "expand":
        return expand(wide, operands.slices[0].stack, _of(operands.adapter_ids))
    if function == "int4_moe":
        return int4_moe(
            wide,
            _of(operands.experts),
            _of(operands.topk_ids),
            _of(operands.topk_weights),
            operands.experts_lora,
            operands.adapter_ids,
            activation=operands.activation,
            weights_first=operands.weights_first,
        )
    return int4_lora_linear(
        wide, _weight_of(operands), operands.lora, operands.adapter_ids, operands.bias
    )


def _layer_on(dense: Tensor, operands: Operands) -> Tensor:
    """Return the exact layer on another dense weight."""
    x = operands.activations.double()
    with_adapters = int4_lora_linear(x, _weight_of(operands), operands.lora, operands.adapter_ids)
    base = int4_lora_linear(x, _weight_of(operands))
    delta = torch.where(base.isfinite(), with_adapters - base, 0.0)  # [tokens, out_features]
    bias = 0.0 if operands.bias is None else operands.bias.double()
    result: Tensor = x @ dense.T + delta + bias
    return result


def _weight_answer(operands: Operands, manifest: Manifest, exact: Tensor) -> Answer:
    weight = _weight_of(operands)
    dtype = operands.dtype or dense_dtype(weight)
    bound = torch.zeros(exact.shape, dtype=torch.float64, device=exact.device)
    if manifest.weight_rounded:
        return Answer(exact, dtype, bound, (exact,))
    unrounded = unrounded_weight(weight)
    rounded, last = FORMATS[dense_dtype(weight)], FORMATS[dtype]
    once = exact.double().abs() * (rounded.u + last.u)
    bound = once + rounded.output_underflow + last.output_underflow
    return Answer(exact, dtype, torch.where(bound.isnan(), torch.inf, bound), (exact, unrounded))


def _part_bound(function: str, operands: Operands, manifest: Manifest, exact: Tensor) -> Tensor:
    """Return gamma_(n + 2) of the sums of ``shrink`` or ``expand``; 2 is for the scaling."""
    stack, value = operands.slices[0].stack, operands.activations
    inside, truth = FORMATS[manifest.sums_of(value)], FORMATS[torch.float64]
    activations: dict[str, Any] = {"x" if operands.h is None else "h": value.abs()}
    magnitude = exact_answer(
        function, dataclasses.replace(operands, lora=_magnitudes(stack), **activations)
    )
    n = value.shape[1] + 2
    bound = (gamma(n, inside.u) + gamma(n, truth.u)) * magnitude
    bound = bound + inside.product_underflow * (n + magnitude)
    return torch.where(bound.isnan() | ~exact.isfinite(), torch.inf, bound)


def _weight_of(operands: Operands) -> BaseWeight:
    """Return the weight, INT4 or FP4; there must be one."""
    weight = operands.base_weight
    if weight is None:
        raise ValueError("an operand that the function needs is None: weight")
    return weight


def _of(value: T | None) -> T:
    """Return an operand that the function needs; it must not be None."""
    if value is None:
        raise ValueError("an operand that the function needs is None")
    return value
