"""Adapters added to a base that somebody else computed: the layer without its base.

y = RN_x( base + scaling * (x A^T) B^T )

For engines whose own kernel multiplies with the base weight. The base was rounded already, so the
whole declares ``base_rounded=True``.

Source: ``int4_lora.reference.lora``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.compiled import graphs
from int4_lora.compiled.lora_terms import add_terms
from int4_lora.compiled.prepared_lora import PreparedLoRA
from int4_lora.reference.checks import ID_DTYPES, X_DTYPES, check_dtype, check_shape

__all__ = ["add_lora"]


def add_lora(base: Tensor, x: Tensor, lora: PreparedLoRA, adapter_ids: Tensor) -> Tensor:
    """Add each token's adapter to the outputs of a base layer.

    Args:
        base: ``[tokens, out_features]``, in the dtype of x; it is not written to.
        x: ``[tokens, in_features]``, float16, bfloat16, float32 or float64.
        lora: what ``prepare_lora`` returned.
        adapter_ids: int32 or int64 ``[tokens]``; an id outside ``[0, adapters)`` means no adapter.

    Returns:
        ``[tokens, out_features]`` in the dtype of x.

    Raises:
        TypeError: an operand of the wrong type or dtype.
        ValueError: an operand whose shape or device does not fit.

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
    if torch.compiler.is_compiling():
        return add_terms(base, x, lora.slices, adapter_ids, None)
    if x.shape[0] == 0:
        return base.clone()
    with torch.no_grad():
        return graphs.run_terms(base, x, lora.slices, adapter_ids)


def _check(base: Tensor, x: Tensor, lora: PreparedLoRA, adapter_ids: Tensor) -> None:
    if not isinstance(lora, PreparedLoRA):
        raise TypeError(f"lora must be a PreparedLoRA, got {type(lora).__name__}")
    last = lora.slices[-1]
    check_dtype("x", x, X_DTYPES)
    check_dtype("base", base, (x.dtype,))
    check_shape("x", x, (None, last.a.shape[2]), "[tokens, in_features]")
    check_shape("base", base, (x.shape[0], None), "[tokens, out_features]")
    check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
    check_shape("adapter_ids", adapter_ids, (x.shape[0],), "[tokens]")
    furthest = max(one.stop for one in lora.slices)
    if furthest > base.shape[1]:
        raise ValueError(f"lora writes {furthest} outputs, and base has {base.shape[1]}")
    devices = {one.device for one in (base, x, adapter_ids, last.a)}
    if len(devices) > 1:
        raise ValueError(f"all operands must be on one device, got {sorted(map(str, devices))}")
