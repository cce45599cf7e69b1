"""Gradients for x, a, b, scaling and bias; no dense weight is kept between forward and backward.

With g the gradient of y, i the adapter of a token and z[i] = x A[i]^T:

    dx = g W + scaling[i] (g B[i]) A[i]          dA[i] = scaling[i] (g B[i])^T x
    dB[i] = scaling[i] g^T z[i]                  dscaling[i] = sum of (g B[i]) z[i]

The backward dequantises W again, tile by tile, and sums in the accumulation dtype.

Source: the derivative of ``int4_lora.reference.int4_lora_linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.layouts.interleaved import InterleavedWeight
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.reference.lora import accumulation_dtype, without_autocast

__all__ = ["differentiable", "needs_gradients"]

TILE_ROWS = 1024
Forward = Callable[..., Tensor]


def needs_gradients(x: Tensor, slices: Sequence[PreparedSlice], bias: Tensor | None) -> bool:
    """Return whether autograd is recording and an operand requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    operands = [x, *(tensor for one in slices for tensor in (one.a, one.bt, one.scaling))]
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
    flat = [tensor for one in slices for tensor in (one.a, one.bt, one.scaling)]
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
        ctx.save_for_backward(x, adapter_ids, *flat)
        plain = [one.detach() for one in slices]
        return forward(
            x.detach(), weight, plain, adapter_ids, None if bias is None else bias.detach()
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grads[0]):
            return _Layer._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, adapter_ids, *flat = ctx.saved_tensors
        sums = accumulation_dtype(x)
        g = grad.to(sums)
        dx = _through_base(g, ctx.weight) if ctx.needs_input_grad[3] else None
        of_adapters: list[Tensor | None] = []
        for index, one in enumerate(ctx.slices):
            a, bt, scaling = flat[3 * index : 3 * index + 3]
            part = g[:, one.start : one.stop]
            own_dx, *own = _through_adapters(part, x.to(sums), a, bt, scaling, adapter_ids)
            of_adapters += own
            dx = None if dx is None else dx + own_dx
        dbias = None if ctx.bias_dtype is None else g.sum(0).to(ctx.bias_dtype)
        dx = None if dx is None else dx.to(x.dtype)
        return (None, None, None, dx, None, dbias, *of_adapters)


def _through_base(g: Tensor, weight: PreparedWeight) -> Tensor:
    """Return ``g W`` with its columns in the order of x."""
    step = max(1, TILE_ROWS // weight.tile) * weight.tile
    total = torch.zeros(g.shape[0], weight.in_features, dtype=g.dtype, device=g.device)
    for start in range(0, weight.out_features, step):
        stop = min(start + step, weight.out_features)
        total = total + g[:, start:stop] @ weight.rows(start, stop, g.dtype)
    if isinstance(weight, InterleavedWeight) and weight.order is not None:
        return torch.zeros_like(total).index_copy(1, weight.order.to(torch.int64), total)
    return total


def _through_adapters(
    g: Tensor, x: Tensor, a: Tensor, bt: Tensor, scaling: Tensor, adapter_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, a, bt and scaling; each adapter uses its own tokens only."""
    dx = torch.zeros_like(x)
    of_a, of_bt, of_scaling = [], [], []
    for adapter in range(a.shape[0]):
        own = (adapter_ids == adapter).unsqueeze(1)
        own_x, own_g = torch.where(own, x, 0), torch.where(own, g, 0)
        wide_a, wide_bt = a[adapter].to(x.dtype), bt[adapter].to(x.dtype)
        factor = scaling[adapter].to(x.dtype)
        z, gz = own_x @ wide_a.T, own_g @ wide_bt.T  # [tokens, rank]
        dx = dx + torch.where(own, factor * (gz @ wide_a), 0)
        of_a.append((factor * (gz.T @ own_x)).to(a.dtype))
        of_bt.append((factor * (z.T @ own_g)).to(bt.dtype))
        of_scaling.append(torch.where(own, gz * z, 0).sum().to(scaling.dtype))
    return dx, torch.stack(of_a), torch.stack(of_bt), torch.stack(of_scaling)
