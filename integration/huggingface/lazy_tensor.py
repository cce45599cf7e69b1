"""A tensor whose values are computed when they are first used.

To save an adapter, PEFT asks for the ``state_dict`` of the whole model and takes the adapter's
tensors. So the others should cost nothing until they are used.

Source: ``torch.Tensor._make_wrapper_subclass``, ``__torch_function__`` and ``__torch_dispatch__``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["LazyTensor"]

_T: Any = torch.Tensor
DESCRIPTIONS = frozenset(
    {_T.shape.__get__, _T.dtype.__get__, _T.device.__get__, _T.ndim.__get__, _T.layout.__get__}
    | {_T.size, _T.dim, _T.numel, _T.nelement, _T.element_size, _T.nbytes.__get__}
    | {_T.is_floating_point, _T.is_complex, _T.requires_grad.__get__, _T.__len__, _T.__hash__}
)


class LazyTensor(Tensor):
    """A tensor that computes its values once, at their first use.

    Args:
        compute: returns the values; called once at most.
        like: a tensor with the shape, the dtype and the device of the values.

    Example:
        >>> lazy = LazyTensor(lambda: torch.arange(3) * 2, like=torch.arange(3))
        >>> lazy.shape
        torch.Size([3])
        >>> lazy + 0
        tensor([0, 2, 4])
    """

    _compute: Callable[[], Tensor]
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], like: Tensor) -> LazyTensor:
        """Make a tensor without a storage."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, dtype=like.dtype, device=like.device
        )
        made._compute, made._computed = compute, None
        return made

    def plain(self) -> Tensor:
        """Return the values as a plain tensor, the same one in each call."""
        if self._computed is None:
            self._computed = self._compute()
            del self._compute
        return self._computed

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        """Describe the tensor without computing it."""
        return f"LazyTensor(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what the tensor looks like; compute it for everything else."""
        if func in DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _with_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute the tensor for an operation that C++ calls."""
        return _with_values(func, args, kwargs)


def _with_values(func: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> Any:
    """Call ``func`` with values in place of lazy tensors."""
    args, kwargs = tree_map_only(LazyTensor, LazyTensor.plain, (tuple(args), kwargs or {}))
    return func(*args, **kwargs)
