"""The dense weight of an INT4 layer: computed where it is read, and never written to.

It is that of a linear, or those of all experts of a layer in one tensor. Libraries ask a layer for
``weight.dtype`` or ``weight.device`` far more often than for its values. So the tensor knows its
shape, dtype and device, and an operation on it dequantises first. It holds no dense values, so a
write would be lost: in-place operations and ``weight.data = ...`` raise a RuntimeError. (A
TypeError would not do: torch makes ``NotImplemented`` of it in ``+=``, and Python then computes
``+``.)

Source: ``torch.Tensor._make_wrapper_subclass`` and ``__torch_dispatch__``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from int4_lora.compiled import PreparedWeight

__all__ = ["READ_ONLY", "DequantisedWeight", "WeightOfExperts", "dense_weight"]

READ_ONLY = (
    "the weight of an INT4 layer cannot be written to: it is dequantised from INT4 where it is "
    "read. To merge adapters into INT4, run `int4-lora merge MODEL RESULT --adapter ADAPTER --to "
    "int4`; for dense layers, call PEFT's merge_and_unload()"
)
_T: Any = torch.Tensor
SETTERS = frozenset({_T.data.__set__})
OF_VALUES = frozenset(  # they need a storage, which this tensor does not have
    {_T.numpy, _T.tolist, _T.__array__, _T.__deepcopy__, _T.__reduce_ex__, _T.__format__}
)


@dataclass(frozen=True, eq=False)
class WeightOfExperts:
    """The weights of one projection of all experts, as one weight ``[experts, out, in]``.

    Args:
        experts: the prepared weight of each expert, all of one shape.
    """

    experts: Sequence[PreparedWeight]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The number of experts, and the shape of each weight."""
        return len(self.experts), *self.experts[0].shape

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.experts[0].device


def dense_weight(weight: PreparedWeight | WeightOfExperts, dtype: torch.dtype) -> Tensor:
    """Return a layer's dense weight, ``RN_scale((q - z) * s)`` cast to ``dtype``.

    Args:
        weight: returned by ``int4_lora.compiled.prepare``, or several of them.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        ``[out_features, in_features]``, columns in the order of x; of experts
        ``[experts, out_features, in_features]``.

    Example:
        >>> from int4_lora.compiled import prepare
        >>> from int4_lora.reference import quantize
        >>> weight = prepare(quantize(torch.eye(2, 6), group_size=3))
        >>> dense_weight(weight, torch.float32)[0, :3]
        tensor([0.9333, 0.0000, 0.0000])
    """
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if isinstance(weight, WeightOfExperts):
        for expert, single in enumerate(weight.experts):
            dense[expert] = dense_weight(single, dtype)
        return dense
    for start, stop in weight.blocks():
        dense[start:stop] = weight.dense_rows(start, stop, dtype)
    return dense


class DequantisedWeight(Tensor):
    """A read-only tensor with the values of ``dense_weight``, which it computes in operations.

    Args:
        weight: as in ``dense_weight``.
        dtype: the dtype of the values.
        dense: the values, if they exist: a view of what another such tensor computed.
    """

    weight: PreparedWeight | WeightOfExperts
    _dense: Tensor | None

    @staticmethod
    def __new__(
        cls,
        weight: PreparedWeight | WeightOfExperts,
        dtype: torch.dtype,
        dense: Tensor | None = None,
    ) -> DequantisedWeight:
        """Make a tensor without a storage."""
        shape = weight.shape if dense is None else dense.shape
        strides = None if dense is None else dense.stride()
        made = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=weight.device
        )
        made.weight, made._dense = weight, dense
        return made

    def dense(self) -> Tensor:
        """Return the values as a plain tensor."""
        if self._dense is not None:
            return self._dense
        return dense_weight(self.weight, self.dtype)

    def __repr__(  # type: ignore[override]
        self, *, tensor_contents: Any = None
    ) -> str:
        """Describe the tensor without dequantising it."""
        return f"DequantisedWeight(shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse ``weight.data = ...``; dequantise where plain values are needed."""
        if func in SETTERS:
            raise RuntimeError(READ_ONLY)
        if func in OF_VALUES:
            return func(args[0].dense(), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Dequantise, then call ``func``; its views of the values are read-only, too."""
        given = dict(
            zip((argument.name for argument in func._schema.arguments), args, strict=False)
        )
        given |= kwargs or {}
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and _weights_in(given.get(argument.name)):
                raise RuntimeError(READ_ONLY)
        if func is torch.ops.aten.detach.default:
            (same,) = args
            return DequantisedWeight(same.weight, same.dtype, same._dense)
        source = _weights_in(given)[0]
        args, kwargs = tree_map_only(
            DequantisedWeight, DequantisedWeight.dense, (tuple(args), kwargs or {})
        )
        result = func(*args, **kwargs)  # pyright: ignore[reportCallIssue]
        if not any(output.alias_info is not None for output in func._schema.returns):
            return result
        return tree_map_only(
            Tensor, lambda view: DequantisedWeight(source.weight, view.dtype, view), result
        )


def _weights_in(values: Any) -> list[DequantisedWeight]:
    """Return the weights among the arguments of an operation, those in lists as well."""
    return [value for value in tree_leaves(values) if isinstance(value, DequantisedWeight)]
