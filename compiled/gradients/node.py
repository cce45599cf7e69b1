"""The layer as one node of autograd's graph; no dense weight is kept between its two passes.

With g the gradient of y, i the adapter of a token and z[i] = x A[i]^T:

    dx = g W + scaling[i] (g B[i]) A[i]          dA[i] = scaling[i] (g B[i])^T x
    dB[i] = scaling[i] g^T z[i]                  dscaling[i] = sum of (g B[i]) z[i]

The backward is compiled like the forward. Where it becomes part of another graph, or is
differentiated itself (``create_graph=True``), the same functions run uncompiled.

Source: the derivative of ``int4_lora.reference.int4_lora_linear``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.gradients.adapter import Wanted, through_adapter
from int4_lora.compiled.gradients.base import through_base
from int4_lora.compiled.gradients.plan import plan_adapter_gradients, plan_gradient
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference.lora import accumulation_dtype, without_autocast

__all__ = ["differentiable", "needs_gradients"]

Forward = Callable[..., Tensor]
X, BIAS, FLAT = 3, 5, 6  # where the operands stand among the arguments of the node
PARTS = 3  # tensors of a slice


def needs_gradients(x: Tensor, slices: Sequence[PreparedSlice], bias: Tensor | None) -> bool:
    """Return whether autograd is recording and an operand requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    operands = [x, *(tensor for part in slices for tensor in (part.a, part.bt, part.scaling))]
    return any(tensor.requires_grad for tensor in operands) or (
        bias is not None and bias.requires_grad
    )


def differentiable(
    forward: Forward,
    x: Tensor,
    weight: PreparedWeight,
    slices: Sequence[PreparedSlice],
    adapter_ids: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return ``forward(x, weight, slices, adapter_ids, bias)`` with gradients."""
    flat = [tensor for part in slices for tensor in (part.a, part.bt, part.scaling)]
    apply: Callable[..., Tensor] = _Layer.apply  # untyped in torch
    return apply(forward, weight, slices, x, adapter_ids, bias, *flat)


class _Layer(torch.autograd.Function):
    """The layer as one node of autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Forward,
        weight: PreparedWeight,
        slices: Sequence[PreparedSlice],
        x: Tensor,
        adapter_ids: Tensor | None,
        bias: Tensor | None,
        *flat: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.slices = weight, slices
        ctx.bias_dtype = None if bias is None else bias.dtype
        reads_x = any(ctx.needs_input_grad[FLAT:])  # else x need not stay in memory
        ctx.save_for_backward(x if reads_x else None, adapter_ids, *flat)
        plain = [part.detach() for part in slices]
        y = forward(x.detach(), weight, plain, adapter_ids, None if bias is None else bias.detach())
        # in a graph, torch 2.11 gives zero gradients if the last cast changed nothing: upstream.md
        return y.view_as(y) if torch.compiler.is_compiling() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grads[0]):
            return _Layer._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, adapter_ids, *flat = ctx.saved_tensors
        wants_x, wants = ctx.needs_input_grad[X], ctx.needs_input_grad[FLAT:]
        sums = accumulation_dtype(g)
        dx = _base(g, ctx.weight, sums if flat else g.dtype) if wants_x else None
        of_adapters: list[Tensor | None] = []
        for index, part in enumerate(ctx.slices):
            place = slice(PARTS * index, PARTS * (index + 1))
            a, bt, scaling = flat[place]
            saved = dataclasses.replace(part, a=a, bt=bt, scaling=scaling, finite=True)
            wanted = Wanted(wants_x, *wants[place])
            delta, gradients = _adapters(g, x, adapter_ids, saved, wanted)
            dx = dx if dx is None or delta is None else dx + delta
            of_adapters += gradients
        dx = None if dx is None else dx.to(g.dtype)
        dbias = g.sum(0, dtype=sums).to(ctx.bias_dtype) if ctx.needs_input_grad[BIAS] else None
        return (None, None, None, dx, None, dbias, *of_adapters)


def _is_inlined() -> bool:
    """Return whether another graph takes the backward in, or the backward is differentiated."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled()


def _base(g: Tensor, weight: PreparedWeight, dtype: torch.dtype) -> Tensor:
    """Return the gradient of x through the base."""
    if _is_inlined():
        return through_base(g, weight, dtype)
    if g.shape[0] == 0:
        return g.new_zeros(0, weight.in_features, dtype=dtype)
    return plan_gradient(g, weight, dtype)(g)


def _adapters(
    g: Tensor, x: Tensor | None, adapter_ids: Tensor, part: PreparedSlice, wanted: Wanted
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients through a slice: that of x, and those of a, bt and scaling.

    Each adapter is computed alone, by the same graph, from its tokens only.
    """
    if not (wanted.x or wanted.reads_x):
        return None, [None, None, None]
    dx: Tensor | None = None
    of_adapters: list[list[Tensor]] = []
    for adapter in range(part.adapters):
        uses = adapter_ids == adapter
        single = dataclasses.replace(
            part,
            a=part.a[adapter : adapter + 1],
            bt=part.bt[adapter : adapter + 1],
            scaling=part.scaling[adapter : adapter + 1],
        )
        if _is_inlined() or g.shape[0] == 0:
            gradients = list(through_adapter(g, x, uses, single, wanted))
        else:
            entry = plan_adapter_gradients(g, x, uses, single.detach(), wanted)
            gradients = list(entry(g, x, uses))
        if wanted.x:
            delta = gradients.pop(0)
            dx = delta if dx is None else dx + delta
        of_adapters.append(gradients)
    stacked = [torch.stack(each) for each in zip(*of_adapters, strict=True)]
    of_operands: list[Tensor | None] = []
    for wants in (wanted.a, wanted.bt, wanted.scaling):  # torch 2.8 cannot trace slices of tuples
        of_operands.append(stacked.pop(0) if wants else None)
    return dx, of_operands
