"""Give the hooks of a module to the module that replaces it.

Source: ``torch.nn.Module``, and ``add_hook_to_module`` of accelerate.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["carry_hooks"]

DICTIONARIES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hooks of ``old``: torch's, and the one that accelerate puts around forward.

    The dictionaries themselves move, so that the handles that torch returned still remove hooks.

    Args:
        old: the module that is replaced; it is not to be used any more.
        new: the module in its place, without hooks.
    """
    for name in DICTIONARIES:
        new.__dict__[name] = old.__dict__[name]
    hook: Any = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
