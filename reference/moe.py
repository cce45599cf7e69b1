"""The expert layers of a mixture of experts: INT4 weights, and an adapter for each token on top.

For token t, whose router chose the experts e_1 ... e_k with the weights p_1 ... p_k:

    y_t = RN_x( sum_j  p_j * down_e( act(gate_e(x_t)) * up_e(x_t) ) )        e = e_j, j in order

gate_e, up_e and down_e are INT4 layers with the adapter of the token, as in ``linear.py``, but not
rounded: everything inside RN_x is in float32 (float64 when x is float64). With ``weights_first``,
the expert gets ``p_j * x_t`` and its result is not multiplied. An expert id of -1 drops its term.

Source: Shazeer et al., "Outrageously Large Neural Networks", arXiv:1701.06538; Shazeer, "GLU
Variants Improve Transformer", arXiv:2002.05202; ``docs/numerics.md``, "Experts".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from int4_lora.reference.checks import (
    ID_DTYPES,
    X_DTYPES,
    check_adapter_ids,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.experts import ExpertsLoRA, ExpertsWeight
from int4_lora.reference.linear import int4_linear, int4_lora_linear
from int4_lora.reference.lora import accumulation_dtype, check_accumulates
from int4_lora.reference.packed_weight import PackedWeight

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "activated",
    "check_moe",
    "check_options",
    "check_top_k",
    "expert_layer",
    "int4_moe",
    "routed",
]

Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS = ("silu", "gelu_tanh")


def int4_moe(
    x: Tensor,
    experts: ExpertsWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: ExpertsLoRA | None = None,
    adapter_ids: Tensor | None = None,
    *,
    activation: Activation = "silu",
    weights_first: bool = False,
) -> Tensor:
    """Apply each token's experts, with its adapter, and sum their results.

    ``y = RN_x(sum_j p_j * down(act(gate(x)) * up(x)))`` over the k experts of the token, in their
    order. It is differentiable in x, topk_weights, and a and b of the adapters.

    Args:
        x: ``[tokens, hidden]``, float16, bfloat16, float32 or float64; tokens may be 0.
        experts: the weights of all experts. Those that no token uses are not read.
        topk_ids: int32 or int64 ``[tokens, k]``, each in ``[-1, experts)``; -1 adds nothing. A
            token may use an expert more than once.
        topk_weights: ``[tokens, k]``, float: the weight of each expert's result.
        lora: the adapters of the experts, or None.
        adapter_ids: int32 or int64 ``[tokens]``, each in ``[-1, adapters)``; needed with ``lora``.
        activation: "silu", or "gelu_tanh", the approximation of GELU by tanh.
        weights_first: whether topk_weights multiply x instead of the results.

    Returns:
        ``[tokens, hidden]`` in the dtype of x.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.

    Example:
        >>> from int4_lora.reference import quantize
        >>> experts = ExpertsWeight(
        ...     [quantize(torch.full((2, 4), e + 1.0), group_size=4) for e in range(2)],
        ...     [quantize(torch.ones(4, 1), group_size=1) for e in range(2)],
        ... )
        >>> ids, weights = torch.tensor([[1], [-1]]), torch.tensor([[0.5], [0.5]])
        >>> int4_moe(torch.ones(2, 4), experts, ids, weights).shape
        torch.Size([2, 4])

    Source:
        ``docs/numerics.md``, "Experts".
    """
    adapter_ids = check_moe(
        x, experts, topk_ids, topk_weights, lora, adapter_ids, activation, weights_first
    )
    wide = x.to(accumulation_dtype(x))
    p = topk_weights.to(wide.dtype)[..., None]  # [tokens, k, 1]
    results = wide.new_zeros(*topk_ids.shape, experts.hidden)  # [tokens, k, hidden]
    for expert, tokens, slots in routed(topk_ids):
        ids, chosen = adapter_ids[tokens], wide[tokens]  # [routed], [routed, hidden]
        if weights_first:
            chosen = p[tokens, slots] * chosen
        gate_up = expert_layer("gate_up", expert, chosen, experts, lora, ids)
        gate, up = gate_up.chunk(2, dim=1)  # [routed, inter] each
        h = activated(gate, activation) * up
        y = expert_layer("down", expert, h, experts, lora, ids)
        if not weights_first:
            y = p[tokens, slots] * y
        results = results.index_put((tokens, slots), y)
    total = results[:, 0]
    for slot in range(1, topk_ids.shape[1]):
        total = total + results[:, slot]
    return total.to(x.dtype)


def activated(gate: Tensor, activation: Activation) -> Tensor:
    """Return ``g * sigmoid(g)``, or ``g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3)))``."""
    if activation == "silu":
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh")


def expert_layer(
    name: Literal["gate_up", "down"],
    expert: int,
    x: Tensor,
    experts: ExpertsWeight,
    lora: ExpertsLoRA | None,
    ids: Tensor,
) -> Tensor:
    """Apply a layer of an expert, which may have no adapters whatever the ids are."""
    weight: PackedWeight = getattr(experts, name)[expert]
    slices = () if lora is None else lora.slices(name, expert)
    return int4_lora_linear(x, weight, slices, ids) if slices else int4_linear(x, weight)


def routed(topk_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each used expert with the tokens that chose it, and in which of their k slots."""
    for expert in sorted({*topk_ids.flatten().tolist()}):
        if expert >= 0:
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            yield expert, tokens, slots


def check_moe(
    x: Tensor,
    experts: ExpertsWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    lora: ExpertsLoRA | None,
    adapter_ids: Tensor | None,
    activation: Activation,
    weights_first: bool,
) -> Tensor:
    """Check all operands; return the adapter ids: all -1 where none are given.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape, value or device does not fit.
    """
    if not isinstance(experts, ExpertsWeight):
        raise TypeError(f"experts must be an ExpertsWeight, got {type(experts).__name__}")
    check_dtype("x", x, X_DTYPES)
    check_shape("x", x, (None, experts.hidden), "[tokens, hidden]")
    _check_routing(x, experts, topk_ids, topk_weights)
    check_options(activation, weights_first)
    if lora is not None:
        _check_lora(x, experts, lora)
    if adapter_ids is None:
        if lora is not None:
            raise ValueError("adapter_ids must be given with lora, got None")
        return torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
    check_one_device(x=x, adapter_ids=adapter_ids)
    check_adapter_ids(adapter_ids, x.shape[0], lora.adapters if lora else 0)
    return adapter_ids


def check_options(activation: object, weights_first: object) -> None:
    """Check the arguments that are not tensors.

    Raises:
        TypeError: ``weights_first`` is not a bool.
        ValueError: ``activation`` is not one of ``ACTIVATIONS``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if type(weights_first) is not bool:
        raise TypeError(f"weights_first must be a bool, got {type(weights_first).__name__}")


def check_top_k(topk_ids: Tensor, experts: int) -> None:
    """Check that ``topk_ids`` chooses at least one and at most all experts for each token.

    Raises:
        ValueError: it does not.
    """
    if not 1 <= topk_ids.shape[1] <= experts:
        raise ValueError(
            f"topk_ids must choose between 1 and all {experts} experts for each token, "
            f"got k = {topk_ids.shape[1]}"
        )


def _check_routing(
    x: Tensor, experts: ExpertsWeight, topk_ids: Tensor, topk_weights: Tensor
) -> None:
    check_dtype("topk_ids", topk_ids, ID_DTYPES)
    check_shape("topk_ids", topk_ids, (x.shape[0], None), "[tokens, k]")
    check_top_k(topk_ids, experts.count)
    check_dtype("topk_weights", topk_weights, X_DTYPES)
    check_shape("topk_weights", topk_weights, topk_ids.shape, "[tokens, k]")
    check_accumulates("topk_weights", topk_weights, x)
    check_one_device(
        x=x, experts=experts.down[0].packed, topk_ids=topk_ids, topk_weights=topk_weights
    )
    if topk_ids.numel() == 0:
        return
    low, high = int(topk_ids.min()), int(topk_ids.max())
    if low < -1 or high >= experts.count:
        value = low if low < -1 else high
        raise ValueError(
            f"topk_ids must be in [-1, {experts.count}) (-1 drops the expert), got {value}"
        )


def _check_lora(x: Tensor, experts: ExpertsWeight, lora: ExpertsLoRA) -> None:
    if not isinstance(lora, ExpertsLoRA):
        raise TypeError(f"lora must be an ExpertsLoRA, got {type(lora).__name__}")
    lora.check_fits(experts)
    for name in ("gate_up", "down"):
        for expert in range(experts.count):
            for part in lora.slices(name, expert):
                check_accumulates(f"a and b of lora.{name}[{expert}]", part.stack.a, x)
