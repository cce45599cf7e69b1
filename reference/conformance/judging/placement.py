"""Whether a result has memory of its own, and whether it is contiguous.

The numbers of such a result may be right, until the caller writes to it, or passes it to a kernel
that expects rows one after the other.

Source: ``docs/conformance.md``, "The verdict".
"""

from __future__ import annotations

from torch import Tensor

from int4_lora.reference.conformance.cases.operands import Operands, tensors_of
from int4_lora.reference.conformance.judging.verdict import Finding, plain_tensor

__all__ = ["not_contiguous", "shared_memory"]


def shared_memory(result: object, operands: Operands) -> Finding | None:
    """Return a finding if a result is a view of an operand, or if its elements share memory.

    Args:
        result: what the backend returned.
        operands: the arguments of the call.

    Example:
        >>> import torch
        >>> x = torch.zeros(4, 8)
        >>> shared_memory(x[:2], Operands(x=x)).message
        'returned a view of its operand x'
    """
    if plain_tensor(result) is not None or not isinstance(result, Tensor) or not result.numel():
        return None
    start = result.untyped_storage().data_ptr()
    for name, operand in tensors_of(operands).items():
        if start and operand.untyped_storage().data_ptr() == start:
            return Finding("memory", f"returned a view of its operand {name}")
    if _overlaps(result):
        return Finding("memory", f"elements of the result share memory: {_strides(result)}")
    return None


def not_contiguous(result: object) -> Finding | None:
    """Return a finding if a result is a tensor that is not contiguous."""
    if not isinstance(result, Tensor) or result.is_contiguous():
        return None
    return Finding(
        "memory",
        f"the result is not contiguous: {_strides(result)}; claim contiguous=False if that is "
        "meant",
    )


def _strides(result: Tensor) -> str:
    return f"strides {[*result.stride()]} of shape {[*result.shape]}"


def _overlaps(result: Tensor) -> bool:
    """Return whether two elements of a tensor have one place in memory."""
    end = 0  # of the elements of the dimensions with smaller strides
    dims = zip(result.stride(), result.shape, strict=True)
    for stride, length in sorted(dim for dim in dims if dim[1] > 1):
        if stride <= end:
            return True
        end += stride * (length - 1)
    return False
