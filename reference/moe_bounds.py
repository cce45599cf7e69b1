"""How far correct experts may be from the exact result: derived, not tuned.

The bound of a layer (``bounds.py``) is carried through the activation. g and v are the exact
results of gate and up, dg and dv their bounds, f is the activation, u the unit roundoff of the
sums:

==================  ====================================================================
number              at most this far from the exact one
==================  ====================================================================
f(g)                df = min(|f'(g)| + c dg / 2, s) dg + gamma_8 (|g| + dg)
h = f(g) v          dh = |f(g)| dv + |v| df + df dv + u (|f(g)| + df) (|v| + dv)
down(h)             the layer's bound on inputs of |h| + dh, and dh |W|^T with its adapters
sum_j p_j down_j    |p_j| times these; k + 1 more roundings of every product
==================  ====================================================================

s and c are the largest |f'| and |f''|. gamma_8 |g| covers f itself, computed by exp or by tanh with
2 ulp: multiplied out, the roundings of x / (1 + exp(-x)) come to 7.5 u |g|, those of x / 2 (1 +
tanh(x / 2)) to 4 u |g|, those of the tanh form of GELU to 5.6 u |g|. The routed weight may be
multiplied into h, into the result, or into the sum. With ``weights_first``, x is replaced by p x,
which is rounded once. Add for the float64 sums of the exact result the same with u = 2^-53.

``steps_rounded`` adds a rounding to the dtype of x of each number that the steps return.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, section 3.1;
``docs/numerics.md``, "The bound of experts".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from int4_lora.reference.bounds import (
    FORMATS,
    Format,
    LayerSums,
    Sums,
    check_declared,
    gamma,
    layer_sums,
)
from int4_lora.reference.experts import ExpertsLoRA, ExpertsWeight
from int4_lora.reference.moe import (
    Activation,
    activated,
    check_moe,
    expert_layer,
    int4_moe,
    routed,
)

__all__ = ["moe_error_bound"]

ACTIVATION_ROUNDINGS = 8
DELTA_ROUNDINGS = 4  # of x A^T, of B and of the delta, and one for their products
STEEPEST = {"silu": 1.1, "gelu_tanh": 1.13}  # the largest |f'|, rounded up
SHARPEST = {"silu": 0.5, "gelu_tanh": 0.8}  # the largest |f''|, rounded up


@torch.no_grad()
def moe_error_bound(
    x: Tensor,
    experts: ExpertsWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: ExpertsLoRA | None = None,
    adapter_ids: Tensor | None = None,
    *,
    activation: Activation = "silu",
    weights_first: bool = False,
    accumulate: torch.dtype = torch.float32,
    weight_rounded: bool = True,
    steps_rounded: bool = False,
) -> Tensor:
    """Bound ``|y - exact|`` of a backend that computes ``int4_moe`` as it declares.

    ``exact`` is ``int4_moe(x.double(), ...)``. The module's docstring gives the formula.

    Args:
        x: ``[tokens, hidden]``, as in ``int4_moe``.
        experts: the weights of all experts.
        topk_ids: ``[tokens, k]``.
        topk_weights: ``[tokens, k]``.
        lora: the adapters of the experts, or None.
        adapter_ids: ``[tokens]``, or None without adapters.
        activation: as in ``int4_moe``.
        weights_first: as in ``int4_moe``.
        accumulate: the dtype of the sums and of the activation; float64 if x is float64.
        weight_rounded: whether (q - z) * s is rounded to the scale's dtype before use.
        steps_rounded: whether the results of steps are rounded to the dtype of x: p x, the base of
            a layer, x A^T, B times the scaling, the delta and its sum with the base, f(g), h, the
            results of experts and their partial sums.

    Returns:
        float64 ``[tokens, hidden]``, in the units of y. It is infinite where something may
        overflow, where a sum is too long for ``accumulate``, and where the exact result is not
        finite.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.

    Example:
        >>> from int4_lora.reference import quantize
        >>> gate_up, down = (quantize(torch.ones(shape)) for shape in ((256, 128), (128, 128)))
        >>> experts = ExpertsWeight([gate_up], [down])
        >>> routing = torch.tensor([[0]]), torch.tensor([[1.0]])
        >>> bound = moe_error_bound(torch.ones(1, 128) / 128, experts, *routing)
        >>> bool((bound < 1e-2).all())
        True

    Source:
        ``docs/numerics.md``, "The bound of experts".
    """
    check_declared(accumulate, weight_rounded=weight_rounded, steps_rounded=steps_rounded)
    adapter_ids = check_moe(
        x, experts, topk_ids, topk_weights, lora, adapter_ids, activation, weights_first
    )
    wide = x.to(torch.float64)
    exact = int4_moe(
        wide,
        experts,
        topk_ids,
        topk_weights,
        lora,
        adapter_ids if lora else None,
        activation=activation,
        weights_first=weights_first,
    )
    k, output = topk_ids.shape[1], FORMATS[x.dtype]
    steps = _Steps(Sums.of(x, accumulate), output if steps_rounded else None, weight_rounded, k + 1)
    p = topk_weights.to(torch.float64)[..., None]
    error, sizes, largest = (torch.zeros_like(exact) for _ in range(3))
    for expert, tokens, slots in routed(topk_ids):
        ids, weight = adapter_ids[tokens], p[tokens, slots]
        start = _Number.of(wide[tokens], torch.zeros_like(wide[tokens]))
        if weights_first:
            start, weight = steps.multiplied(start, weight), torch.ones_like(weight)
        gate, up = steps.layer("gate_up", expert, start, experts, lora, ids).halves()
        h = steps.gated(gate, up, activation)
        result = steps.layer("down", expert, h, experts, lora, ids)
        weight = weight.abs()
        size = weight * (result.exact.abs() + result.error)
        one_error = weight * result.error
        if steps_rounded:
            one_error = one_error + output.u * size + output.output_underflow
        error.index_add_(0, tokens, one_error)
        sizes.index_add_(0, tokens, size)
        largest.index_add_(0, tokens, weight * result.largest)
    error = error + steps.sums.inside.product_underflow * (k + 1)
    if steps_rounded:
        error = error + gamma(k, output.u) * sizes + k * output.output_underflow
        largest = torch.where(sizes + error >= output.overflow, torch.inf, largest)
    if steps.sums.dtype != x.dtype:
        error = error + output.u * (exact.abs() + error) + output.output_underflow
    unbounded = largest + error >= steps.sums.inside.overflow
    unbounded = unbounded | (exact.abs() + error >= output.overflow) | largest.isnan()
    return torch.where(unbounded | error.isnan() | ~exact.isfinite(), torch.inf, error)


@dataclass(frozen=True, eq=False)
class _Number:
    """Exact values, and how far those of the backend may be from them: float64.

    Args:
        exact: ``[tokens, width]``.
        error: ``[tokens, width]``; infinite where something may overflow.
        largest: ``[tokens, width]``, the largest sum on the way to a layer's results; 0 for others.
    """

    exact: Tensor
    error: Tensor
    largest: Tensor

    @classmethod
    def of(cls, exact: Tensor, error: Tensor) -> _Number:
        """Return a number that is no result of a layer."""
        return cls(exact, error, torch.zeros_like(exact))

    def halves(self) -> tuple[_Number, _Number]:
        """Return the gate and up."""
        parts = (tensor.chunk(2, dim=1) for tensor in (self.exact, self.error, self.largest))
        gate, up = (_Number(*part) for part in zip(*parts, strict=True))
        return gate, up


@dataclass(frozen=True)
class _Steps:
    """The steps of an expert, with the roundings of a backend.

    Args:
        sums: how sums are kept.
        rounded: the format that the result of each step is rounded to, or None.
        weight_rounded: whether (q - z) * s is rounded to the scale's dtype before use.
        joins: in how many additions and products the result of the last layer takes part.
    """

    sums: Sums
    rounded: Format | None
    weight_rounded: bool
    joins: int

    def multiplied(self, x: _Number, p: Tensor) -> _Number:
        """Return p x."""
        return self._step(p * x.exact, torch.zeros_like(x.exact))

    def gated(self, gate: _Number, up: _Number, activation: Activation) -> _Number:
        """Return f(gate) * up."""
        g, v = gate.exact, up.exact
        slope = _slope(g, activation).abs() + SHARPEST[activation] / 2 * gate.error
        error = slope.clamp(max=STEEPEST[activation]) * gate.error
        gammas = gamma(ACTIVATION_ROUNDINGS, self.sums.u) + gamma(ACTIVATION_ROUNDINGS, 2.0**-53)
        error = error + gammas * (g.abs() + gate.error) + 2 * self.sums.inside.product_underflow
        f = _Number.of(activated(g, activation), error)
        if self.rounded:
            f = _Number.of(f.exact, f.error + self._rounding(f))
        error = f.exact.abs() * up.error + v.abs() * f.error + f.error * up.error
        return self._step(f.exact * v, error)

    def layer(
        self,
        name: Literal["gate_up", "down"],
        expert: int,
        x: _Number,
        experts: ExpertsWeight,
        lora: ExpertsLoRA | None,
        ids: Tensor,
    ) -> _Number:
        """Return a layer of an expert on inputs that may be wrong by their error."""
        exact = expert_layer(name, expert, x.exact, experts, lora, ids)
        slices = () if lora is None else lora.slices(name, expert)
        joins, slack = 0, x.error
        if name == "down":  # the routed weight may be multiplied into h
            joins, slack = self.joins, x.error + self.sums.inside.product_underflow
        layer = layer_sums(
            x.exact,
            getattr(experts, name)[expert],
            slices,
            ids if slices else torch.full_like(ids, -1),
            sums=self.sums,
            weight_rounded=self.weight_rounded,
            slack=slack,
            joins=joins,
        )
        error = layer.error
        if self.rounded:
            base = expert_layer(name, expert, x.exact, experts, None, ids)
            error = self._rounded_layer(exact, layer, base)
        largest = layer.largest + layer.error
        error = torch.where(largest >= self.sums.inside.overflow, torch.inf, error)
        return _Number(exact, error, largest)

    def _rounded_layer(self, exact: Tensor, layer: LayerSums, base: Tensor) -> Tensor:
        """Return the error with the base, the parts of the delta and their sum rounded."""
        error = layer.error + self._rounding(_Number.of(base, layer.error))
        if self.rounded is not None and bool(layer.delta.any()):
            error = error + DELTA_ROUNDINGS * self.rounded.u * layer.delta
            error = error + DELTA_ROUNDINGS * self.rounded.output_underflow
        return error + self._rounding(_Number.of(exact, error))

    def _step(self, exact: Tensor, error: Tensor) -> _Number:
        """Return a product that is rounded to the dtype of the sums, and maybe to that of x."""
        inside, size = self.sums.inside, exact.abs() + error
        error = error + (self.sums.u + 2.0**-53) * size + inside.product_underflow
        error = torch.where(size + error >= inside.overflow, torch.inf, error)
        if self.rounded:
            error = error + self._rounding(_Number.of(exact, error))
        return _Number.of(exact, error)

    def _rounding(self, number: _Number) -> Tensor:
        """Return what rounding to the dtype of x loses: infinite where it may overflow."""
        if self.rounded is None:
            return torch.zeros_like(number.exact)
        size = number.exact.abs() + number.error
        lost = self.rounded.u * size + self.rounded.output_underflow
        return torch.where(size + lost >= self.rounded.overflow, torch.inf, lost)


def _slope(g: Tensor, activation: Activation) -> Tensor:
    """Return the derivative of the activation at g."""
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        return sigmoid * (1 + g * (1 - sigmoid))
    factor, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(factor * (g + cubic * g**3))
    return (1 + t) / 2 + g / 2 * (1 - t * t) * factor * (1 + 3 * cubic * g**2)
