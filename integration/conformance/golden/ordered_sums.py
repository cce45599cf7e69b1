"""Sums in a fixed order, so that golden files are byte-identical wherever they are written.

The order in which a library's matrix product adds depends on the processor and the number of
threads. Inside ``ordered_sums``, elementwise operations add term by term, from the first to the
last; IEEE 754 fixes their results.

Source: ``docs/golden-format.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from int4_lora.reference.conformance.judging.yardstick import one_by_one

__all__ = ["ordered_sums"]


class ordered_sums(TorchFunctionMode):
    """A context in which ``@``, ``sum`` and ``mean`` add one term after the other.

    Example:
        >>> with ordered_sums():
        ...     total = torch.ones(2, 3) @ torch.ones(3, 2)
        >>> total.tolist()
        [[3.0, 3.0], [3.0, 3.0]]
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace the functions that add."""
        options = dict(kwargs or {})
        if func in PRODUCTS:
            return one_by_one(args[0], args[1].T)
        if func in SUMS and args[0].is_floating_point():
            return _summed(*args, **options)
        if func in MEANS:
            return _summed(args[0]) / args[0].numel()
        return func(*args, **options)


PRODUCTS = (torch.Tensor.__matmul__, torch.matmul, torch.Tensor.matmul)
SUMS = (torch.sum, torch.Tensor.sum)
MEANS = (torch.mean, torch.Tensor.mean)


def _summed(value: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Return the sum over one dimension, or over all elements."""
    if dim is None:
        value, dim, keepdim = value.flatten(), 0, False
    total = torch.zeros_like(value.select(dim, 0)) if value.shape[dim] else value.sum(dim)
    for index in range(value.shape[dim]):
        total = total + value.select(dim, index)
    return total.unsqueeze(dim) if keepdim else total
