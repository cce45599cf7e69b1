"""What a ``state_dict`` gives of the checkpoint's tensors that a packed module holds.

A module takes all of them or none: a missing or unfitting tensor is reported as ``torch`` reports
its own.

Source: ``torch.nn.Module._load_from_state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["given_tensors", "other_entries"]


def given_tensors(
    state_dict: Mapping[str, Any],
    prefix: str,
    held: Mapping[str, Tensor],
    missing_keys: list[str],
    error_msgs: list[str],
) -> dict[str, Any] | None:
    """Return the tensors that take the place of ``held``, or None if they are not all there.

    Args:
        state_dict: tensors by full name.
        prefix: of the module.
        held: the module's tensors by their names in the module; values are not read.
        missing_keys: the full names of missing tensors are added.
        error_msgs: a sentence is added for each tensor of another dtype or shape.

    Example:
        >>> import torch
        >>> missing, errors = [], []
        >>> given_tensors({}, "q.", {"weight_scale": torch.ones(2)}, missing, errors), missing
        (None, ['q.weight_scale'])
    """
    given = {name: state_dict[prefix + name] for name in held if prefix + name in state_dict}
    missing = [prefix + name for name in held if name not in given]
    wrong = [
        f"{prefix}{name}: must be {held[name].dtype} {list(held[name].shape)}, got "
        f"{tensor.dtype} {list(tensor.shape)}"
        for name, tensor in given.items()
        if (tensor.dtype, tensor.shape) != (held[name].dtype, held[name].shape)
    ]
    missing_keys += missing
    error_msgs += wrong
    return None if missing or wrong else given


def other_entries(
    state_dict: Mapping[str, Any], prefix: str, held: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the entries of a ``state_dict`` that do not replace a tensor of ``held``."""
    return {key: state_dict[key] for key in state_dict if key.removeprefix(prefix) not in held}
