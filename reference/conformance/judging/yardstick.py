"""The yardstick: the same layer in eager PyTorch, which adds its products one after the other.

A bound must hold for the worst roundings, so random errors lie far below it. A correct backend's
rms error is about the yardstick's, and at most twice as large.

Source: flash-attention's tests: "at most twice the error of the same maths in low precision".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from int4_lora.reference.bounds import FORMATS
from int4_lora.reference.conformance.cases.operands import Operands
from int4_lora.reference.conformance.judging.answers import WEIGHTS, Answer
from int4_lora.reference.conformance.judging.verdict import RMS_ELEMENTS, error_of, rms_of
from int4_lora.reference.conformance.manifest import Manifest
from int4_lora.reference.dequantization import linear_weight, unrounded_weight
from int4_lora.reference.moe import activated, routed

__all__ = [
    "ORDERS",
    "Order",
    "interleaved",
    "largest_rms",
    "one_by_one",
    "yardstick",
    "yardstick_rms",
]


Order = Callable[[int], Sequence[int]]
"""The number of products -> the order in which they are added."""


def interleaved(count: int) -> Sequence[int]:
    """Return the even positions, then the odd ones: where neighbours cancel, sums still grow."""
    return (*range(0, count, 2), *range(1, count, 2))


ORDERS: tuple[Order, ...] = (range, interleaved)
"""The orders in which the yardstick is computed; the larger rms error counts."""


def yardstick(
    function: str, operands: Operands, manifest: Manifest, order: Order = range
) -> Tensor:
    """Return the result of an eager backend that makes the declared roundings.

    Args:
        function: "int4_linear", "int4_lora_linear", "int4_moe", "shrink" or "expand".
        operands: its arguments.
        manifest: the dtype that sums are kept in, and the roundings that are made.
        order: of the products.
    """
    if function == "shrink":
        return _shrunk(operands, manifest, order)[0]
    if function == "expand":
        return _expanded(operands, manifest, order)
    if function == "int4_moe":
        return _experts(operands, manifest, order)
    x, weight = operands.x, operands.weight
    if x is None or weight is None:
        raise ValueError(f"{function} needs x and weight")
    inside = manifest.sums_of(x)
    if manifest.weight_rounded:
        dense = linear_weight(weight, inside)
    else:
        dense = unrounded_weight(weight, inside)
    y = one_by_one(x.to(inside), dense, order)
    if manifest.base_rounded:
        y = y.to(x.dtype).to(inside)
    for part, h in zip(operands.slices, _shrunk(operands, manifest, order), strict=True):
        columns, b, scaling = slice(part.start, part.stop), part.stack.b, part.stack.scaling
        if manifest.delta_rounded:
            h = h.to(x.dtype).to(inside)
            b = (b.to(inside) * scaling.to(inside)[:, None, None]).to(x.dtype)
            delta = _by_adapter(h, b, torch.ones_like(scaling), operands, order)
            y[:, columns] += delta.to(x.dtype).to(inside)
        else:
            y[:, columns] += _by_adapter(h, b, scaling, operands, order)
    if operands.bias is not None:
        y = y + operands.bias.to(inside)
    return y.to(x.dtype)


def _experts(operands: Operands, manifest: Manifest, order: Order) -> Tensor:
    """Return the sum over each token's experts, slot after slot."""
    x, experts, ids, p = operands.x, operands.experts, operands.topk_ids, operands.topk_weights
    if x is None or experts is None or ids is None or p is None:
        raise ValueError("int4_moe needs x, experts, topk_ids and topk_weights")
    inside = manifest.sums_of(x)
    step = x.dtype if manifest.steps_rounded else inside  # what a step returns
    p = p.to(inside)[..., None]
    results = torch.zeros(*ids.shape, experts.hidden, dtype=step, device=x.device)
    for expert, tokens, slots in routed(ids):
        part = replace(operands, experts=None, experts_lora=None, topk_ids=None, topk_weights=None)
        part, weight = part.with_tokens(tokens), p[tokens, slots]
        chosen = x[tokens].to(inside)
        chosen = (weight * chosen if operands.weights_first else chosen).to(step)
        gate, up = _of_expert("gate_up", expert, chosen, operands, part, manifest, order).chunk(
            2, 1
        )
        h = (activated(gate, operands.activation).to(step) * up).to(step)
        y = _of_expert("down", expert, h, operands, part, manifest, order)
        results[tokens, slots] = y if operands.weights_first else (weight * y).to(step)
    total = results[:, 0]
    for slot in range(1, ids.shape[1]):
        total = total + results[:, slot]
    return total.to(x.dtype)


def _of_expert(
    name: str,
    expert: int,
    x: Tensor,
    operands: Operands,
    part: Operands,
    manifest: Manifest,
    order: Order,
) -> Tensor:
    """Return a layer of an expert, rounded to the dtype of x."""
    lora = operands.experts_lora
    slices = () if lora is None else lora.slices(name, expert)
    layer = replace(part, x=x, weight=getattr(operands.experts, name)[expert], lora=slices)
    steps = manifest.steps_rounded
    rounded = replace(manifest, base_rounded=steps, delta_rounded=steps)
    return yardstick("int4_lora_linear", layer, rounded, order)


def one_by_one(x: Tensor, dense: Tensor, order: Order = range) -> Tensor:
    """Return ``x @ dense.T``, adding the products one after the other in the dtype of x.

    Args:
        x: ``[tokens, columns]``.
        dense: ``[outputs, columns]``, or ``[tokens, outputs, columns]`` with one for each token.
        order: of the products.
    """
    columns, by_column = x.T.unsqueeze(-1).unbind(), dense.movedim(-1, 0).contiguous().unbind()
    total = torch.zeros(x.shape[0], dense.shape[-2], dtype=x.dtype, device=x.device)
    product = torch.empty_like(total)
    for column in order(x.shape[1]):
        total += torch.mul(columns[column], by_column[column], out=product)
    return total


def _shrunk(operands: Operands, manifest: Manifest, order: Order) -> list[Tensor]:
    """Return x A^T of each slice: ``[tokens, rank]`` in the dtype of the sums."""
    x, ids = operands.x, operands.adapter_ids
    shrunk = []
    for part in operands.slices:
        if x is None or ids is None:
            raise ValueError("adapters need x and adapter_ids")
        inside = manifest.sums_of(x)
        h = torch.zeros(x.shape[0], part.stack.rank, dtype=inside, device=x.device)
        adapted = (ids >= 0) & (ids < part.stack.adapters)
        a = part.stack.a[ids[adapted].long()].to(inside)  # [adapted tokens, rank, in_features]
        h[adapted] = one_by_one(x[adapted].to(inside), a, order)
        shrunk.append(h)
    return shrunk


def _expanded(operands: Operands, manifest: Manifest, order: Order) -> Tensor:
    stack, h = operands.slices[0].stack, operands.h
    if h is None:
        raise ValueError("expand needs h")
    return _by_adapter(h.to(manifest.sums_of(h)), stack.b, stack.scaling, operands, order)


def _by_adapter(h: Tensor, b: Tensor, scaling: Tensor, operands: Operands, order: Order) -> Tensor:
    """Return scaling * h B^T of each token's adapter: ``[tokens, outputs]``."""
    ids = operands.adapter_ids
    if ids is None:
        raise ValueError("adapters need adapter_ids")
    delta = torch.zeros(h.shape[0], b.shape[1], dtype=h.dtype, device=h.device)
    for adapter in range(len(scaling)):
        chosen = ids == adapter
        product = one_by_one(h[chosen], b[adapter].to(h.dtype), order)
        delta[chosen] = scaling[adapter].to(h.dtype) * product
    return delta


def yardstick_rms(
    function: str, operands: Operands, manifest: Manifest, held: Answer
) -> float | None:
    """Return the yardstick's rms error in the worse of two orders, or None.

    Args:
        function: the function that was called.
        operands: its arguments.
        manifest: the declared roundings.
        held: the exact answer and its bound.

    Returns:
        The rms error over the elements that have a bound, plus what results lose when they are
        flushed to zero, which is allowed. None where nothing is summed, and where too few elements
        have a bound for the rms rule.
    """
    judged = held.bound.isfinite()
    if function in ("pack", "unpack", *WEIGHTS) or int(judged.sum()) < RMS_ELEMENTS:
        return None
    on_cpu = operands.to("cpu")
    results = [yardstick(function, on_cpu, manifest, order) for order in ORDERS]
    flushed = FORMATS[manifest.sums_of(operands.activations)].product_underflow
    return largest_rms(results, held) + flushed * (operands.activations.shape[1] + 1)


def largest_rms(results: Sequence[Tensor], held: Answer) -> float:
    """Return the largest rms error of several results, over the elements that have a bound."""
    judged = held.bound.isfinite()
    return max(rms_of(error_of(result.to(judged.device), held)[judged]) for result in results)
