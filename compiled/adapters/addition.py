"""Add adapters to a base that another kernel computed.

y = RN_x( base + scaling * (x A^T) B^T )

For engines whose own kernel multiplies x by the base weight. That kernel has rounded the base
already, so the error bound of the result is that of ``base_rounded=True``.

Source: ``int4_lora.reference.lora``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from int4_lora.compiled.adapters.prepared import PreparedLoRA, PreparedSlice
from int4_lora.compiled.adapters.terms import add_terms
from int4_lora.compiled.checks import check_slices
from int4_lora.compiled.gradients import needs_gradients
from int4_lora.compiled.graphs.entry import plan_terms
from int4_lora.reference.checks import (
    ID_DTYPES,
    X_DTYPES,
    check_dtype,
    check_one_device,
    check_shape,
)
from int4_lora.reference.lora import check_accumulates

__all__ = ["add_lora"]


def add_lora(base: Tensor, x: Tensor, lora: PreparedLoRA, adapter_ids: Tensor) -> Tensor:
    """Add each token's adapter to the outputs of a base layer.

    Differentiable in base, x and the adapters; where a gradient is needed, nothing is compiled.

    Args:
        base: ``[tokens, out_features]``, in the dtype of x; not modified.
        x: ``[tokens, in_features]``, float16, bfloat16, float32 or float64.
        lora: adapters returned by ``prepare_lora``.
        adapter_ids: int32 or int64 ``[tokens]``; an id outside ``[0, adapters)`` means no adapter.

    Returns:
        ``[tokens, out_features]`` in the dtype of x.

    Raises:
        TypeError: an operand has the wrong type or dtype.
        ValueError: an operand has the wrong shape or device.

    Example:
        >>> from int4_lora.compiled import prepare_lora
        >>> from int4_lora.reference import LoRAStack
        >>> lora = prepare_lora(LoRAStack.stack([(torch.ones(1, 4), torch.ones(2, 1), 0.5)]))
        >>> add_lora(torch.zeros(2, 2), torch.ones(2, 4), lora, torch.tensor([0, -1]))
        tensor([[2., 2.],
                [0., 0.]])

    Source:
        ``int4_lora.reference.expand``.
    """
    _check(base, x, lora, adapter_ids)
    if not torch.is_autocast_enabled(x.device.type):
        return _added(base, x, lora.slices, adapter_ids)
    with torch.autocast(x.device.type, enabled=False):
        return _added(base, x, lora.slices, adapter_ids)


def _added(base: Tensor, x: Tensor, slices: Sequence[PreparedSlice], adapter_ids: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or needs_gradients(x, slices, base):
        return add_terms(base, x, slices, adapter_ids, None)
    if x.shape[0] == 0:
        return base.clone()
    with torch.no_grad():
        return plan_terms(base, x, slices, adapter_ids)(base, x, adapter_ids)


def _check(base: Tensor, x: Tensor, lora: PreparedLoRA, adapter_ids: Tensor) -> None:
    check_dtype("x", x, X_DTYPES)
    check_dtype("base", base, (x.dtype,))
    check_shape("x", x, (None, None), "[tokens, in_features]")
    check_shape("base", base, (x.shape[0], None), "[tokens, out_features]")
    check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
    check_shape("adapter_ids", adapter_ids, (x.shape[0],), "[tokens]")
    slices = check_slices(lora, "x", x.shape[1], base.shape[1])
    for part in slices:
        check_accumulates("a and b of lora", part.a, x)
        check_one_device(base=base, x=x, adapter_ids=adapter_ids, lora=part.a)
