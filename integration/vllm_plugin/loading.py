"""Loading a checkpoint's tensors as they are stored.

Source: vLLM's ``BasevLLMParameter``, whose loaders copy into tensors of the model's dtype.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from int4_lora.compiled import PreparedWeight

__all__ = ["in_place_of", "keeping_scale_dtype"]


def keeping_scale_dtype(
    load: Callable[..., Any], scale_dtypes: set[torch.dtype]
) -> Callable[..., Any]:
    """Return a loader that keeps the dtype of the checkpoint's scales; vLLM would cast them.

    Args:
        load: vLLM's loader.
        scale_dtypes: each dtype that is loaded is added to it.
    """

    def loader(param: nn.Parameter, loaded: Tensor, *args: Any, **kwargs: Any) -> Any:
        if loaded.is_floating_point():
            if loaded.dtype != param.dtype and scale_dtypes <= {loaded.dtype}:
                param.data = param.data.to(loaded.dtype)
            scale_dtypes.add(loaded.dtype)
        return load(param, loaded, *args, **kwargs)

    return loader


def in_place_of(packed: Tensor, prepared: PreparedWeight) -> PreparedWeight:
    """Return the same layout in the memory of the checkpoint's words, which are lost.

    Layers are laid out one after the other, between tensors that stay. The memory that each frees
    is not always returned to the system, and may not fit the next.

    Args:
        packed: the checkpoint's words.
        prepared: the same weight, laid out.
    """
    moved = {}
    for field in dataclasses.fields(prepared):  # type: ignore[arg-type]
        laid_out = getattr(prepared, field.name)
        same_size = isinstance(laid_out, Tensor) and laid_out.nbytes == packed.nbytes
        if same_size and laid_out.is_contiguous() and packed.is_contiguous():
            room = packed.view(-1).view(laid_out.dtype).view(laid_out.shape)
            moved[field.name] = room.copy_(laid_out)
            break
    return dataclasses.replace(prepared, **moved)  # type: ignore[type-var]
