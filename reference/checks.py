"""Argument checks that the public functions share.

Each check raises ``TypeError`` for a wrong type or dtype and ``ValueError`` for a wrong
shape or value, and its message names the tensor, the rule and the value that broke it.

Source: ``docs/numerics.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = [
    "ID_DTYPES",
    "SCALE_DTYPES",
    "X_DTYPES",
    "as_device",
    "check_adapter_ids",
    "check_dtype",
    "check_one_device",
    "check_shape",
    "check_symmetric",
]

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
X_DTYPES = (*SCALE_DTYPES, torch.float64)
ID_DTYPES = (torch.int32, torch.int64)


def check_dtype(name: str, value: object, allowed: Collection[torch.dtype]) -> None:
    """Check that ``value`` is a tensor of one of the ``allowed`` dtypes.

    Args:
        name: the name of the argument, for the message.
        value: the argument, of any type.
        allowed: the allowed dtypes.

    Raises:
        TypeError: ``value`` is no tensor, or has another dtype.
    """
    names = [str(dtype).removeprefix("torch.") for dtype in allowed]
    rule = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    if not isinstance(value, Tensor):
        got = "None" if value is None else type(value).__name__
        raise TypeError(f"{name} must be a tensor of {rule}, got {got}")
    if value.dtype not in allowed:
        raise TypeError(f"{name} must be {rule}, got {str(value.dtype).removeprefix('torch.')}")


def check_shape(name: str, value: Tensor, expected: Sequence[int | None], meaning: str) -> None:
    """Check the shape of ``value``; None in ``expected`` leaves that dimension free.

    Args:
        name: the name of the argument, for the message.
        value: the tensor.
        expected: the length of each dimension, or None for any.
        meaning: the shape in words, for the message, for example ``"[tokens, in_features]"``.

    Raises:
        ValueError: the number of dimensions or a length is wrong.
    """
    fits = value.ndim == len(expected) and all(
        length is None or length == actual
        for length, actual in zip(expected, value.shape, strict=True)
    )
    if not fits:
        shape = ", ".join("*" if length is None else str(length) for length in expected)
        raise ValueError(f"{name} must be {meaning} = [{shape}], got {list(value.shape)}")


def check_symmetric(zero_point: Tensor, bits: int) -> None:
    """Check that the zero-points of GPTQ or AWQ are those of a symmetric weight.

    Args:
        zero_point: int8 ``[groups, out_features]``, the stored numbers minus 2**(bits - 1).
        bits: of the stored numbers, for the message.

    Raises:
        ValueError: a zero-point is not 0.
    """
    if zero_point.is_meta:
        return
    skewed = zero_point.nonzero()
    if len(skewed):
        first, half = tuple(skewed[0].tolist()), 2 ** (bits - 1)
        raise ValueError(
            f"zero-points must be {half} in a symmetric weight, got "
            f"{int(zero_point[first]) + half} at {list(first)}"
        )


def as_device(device: object) -> torch.device:
    """Return ``device``, a torch.device or the name of one, as a torch.device.

    Raises:
        TypeError: ``device`` is of another type, for example a dtype.
        ValueError: torch knows no device of that name.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a torch.device or its name, got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, got {device!r}") from error


def check_one_device(**tensors: Tensor | None) -> None:
    """Check that all given tensors are on one device.

    Args:
        tensors: the operands by name; None for an absent one.

    Raises:
        ValueError: two operands are on different devices.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, *others = given
    for name in others:
        if given[name].device != given[first].device:
            raise ValueError(
                f"all operands must be on one device: {first} is on {given[first].device}, "
                f"{name} is on {given[name].device}"
            )


def check_adapter_ids(adapter_ids: Tensor, tokens: int, adapters: int) -> None:
    """Check ``adapter_ids``: an int tensor ``[tokens]`` with values in ``[-1, adapters)``.

    While ``torch.compile`` traces, values are unknown and are not checked: in a graph, an id
    outside the range contributes nothing.

    Args:
        adapter_ids: the argument.
        tokens: the number of rows of x.
        adapters: how many adapters there are to choose from.

    Raises:
        TypeError: not a tensor of int32 or int64.
        ValueError: wrong shape, or an id below -1 or not below ``adapters``.
    """
    check_dtype("adapter_ids", adapter_ids, ID_DTYPES)
    check_shape("adapter_ids", adapter_ids, (tokens,), "[tokens]")
    if torch.compiler.is_compiling() or adapter_ids.is_meta or adapter_ids.numel() == 0:
        return
    low, high = int(adapter_ids.min()), int(adapter_ids.max())
    if low < -1 or high >= adapters:
        value = low if low < -1 else high
        raise ValueError(
            f"adapter_ids must be in [-1, {adapters}) (-1 means no adapter), got {value}"
        )
