"""Low-rank adapters for mixed batches: each token uses its own adapter, or none.

delta[t] = scaling[i] * B[i] (A[i] x[t]) with i = adapter_ids[t], and 0 where i is -1.
The sum over in_features is "shrink", the sum over the rank is "expand". Tokens are masked before
and after each product, so that a NaN of one adapter or token reaches no other's result or
gradient.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685;
the names are those of Chen et al., "Punica: Multi-Tenant LoRA Serving", arXiv:2310.18547.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from int4_lora.reference.checks import (
    ID_DTYPES,
    X_DTYPES,
    check_adapter_ids,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.lora_stack import LoRAStack

__all__ = ["accumulation_dtype", "check_accumulates", "expand", "shrink", "without_autocast"]


def shrink(x: Tensor, lora: LoRAStack, adapter_ids: Tensor) -> Tensor:
    """Project each token to the rank of its adapter: ``h[t] = A[ids[t]] x[t]``.

    Args:
        x: ``[tokens, in_features]``, float16, bfloat16, float32 or float64.
        lora: the adapters.
        adapter_ids: int32 or int64 ``[tokens]``; -1 means no adapter.

    Returns:
        ``[tokens, rank]`` in float32, or float64 if x is; zero where the id is -1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or ids that do not fit.

    Example:
        >>> lora = LoRAStack.stack([(torch.ones(1, 2), torch.ones(2, 1), 0.5)])
        >>> shrink(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), lora, torch.tensor([0, -1]))
        tensor([[3.],
                [0.]])

    Source:
        arXiv:2310.18547, section 4 ("shrink").
    """
    _check_one_layer("x", x, lora, adapter_ids, "in_features")
    accumulate = accumulation_dtype(x)
    h = torch.zeros(x.shape[0], lora.rank, dtype=accumulate, device=x.device)
    for adapter in range(lora.adapters):
        chosen = (adapter_ids == adapter)[:, None]  # [tokens, 1]; never true for the id -1
        a = lora.a[adapter].to(accumulate)
        with without_autocast(x):
            h = torch.where(chosen, torch.where(chosen, x, 0).to(accumulate) @ a.T, h)
    return h


def expand(h: Tensor, lora: LoRAStack, adapter_ids: Tensor) -> Tensor:
    """Project back to the outputs: ``delta[t] = scaling[ids[t]] * B[ids[t]] h[t]``.

    Args:
        h: ``[tokens, rank]``, the result of ``shrink``.
        lora: the adapters.
        adapter_ids: int32 or int64 ``[tokens]``; -1 means no adapter.

    Returns:
        ``[tokens, out_features]`` in float32, or float64 if h is; zero where the id is -1.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or ids that do not fit.

    Example:
        >>> lora = LoRAStack.stack([(torch.ones(1, 2), torch.ones(2, 1), 0.5)])
        >>> expand(torch.tensor([[3.0], [0.0]]), lora, torch.tensor([0, -1]))
        tensor([[1.5000, 1.5000],
                [0.0000, 0.0000]])

    Source:
        arXiv:2310.18547, section 4 ("expand").
    """
    _check_one_layer("h", h, lora, adapter_ids, "rank")
    accumulate = accumulation_dtype(h)
    delta = torch.zeros(h.shape[0], lora.out_features, dtype=accumulate, device=h.device)
    for adapter in range(lora.adapters):
        chosen = (adapter_ids == adapter)[:, None]  # [tokens, 1]
        b, scaling = lora.b[adapter].to(accumulate), lora.scaling[adapter].to(accumulate)
        with without_autocast(h):
            product = scaling * (torch.where(chosen, h, 0).to(accumulate) @ b.T)
        delta = torch.where(chosen, product, delta)
    return delta


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the sums: float64 where x is float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast does not narrow products of float32 tensors."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def check_accumulates(name: str, value: Tensor, x: Tensor) -> None:
    """Check that ``value`` is not wider than the sums, which would silently round it.

    Raises:
        TypeError: ``value`` is float64 and ``x`` is not.
    """
    if value.dtype == torch.float64 and x.dtype != torch.float64:
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must not be float64 where x is {got}: sums are in float32")


def _check_one_layer(
    name: str, x: Tensor, lora: LoRAStack, adapter_ids: Tensor, width_name: str
) -> None:
    if not isinstance(lora, LoRAStack):
        raise TypeError(f"lora must be a LoRAStack, got {type(lora).__name__}")
    check_dtype(name, x, X_DTYPES)
    check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
    width = lora.in_features if width_name == "in_features" else lora.rank
    check_shape(name, x, (None, width), f"[tokens, {width_name}]")
    check_accumulates("a and b of lora", lora.a, x)
    check_one_device(**{name: x}, adapter_ids=adapter_ids, a=lora.a)
    check_adapter_ids(adapter_ids, x.shape[0], lora.adapters)
