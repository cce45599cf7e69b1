"""Loading a checkpoint's tensors as they are stored.

Source: vLLM's ``BasevLLMParameter``, whose loaders copy into tensors of the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["keeping_scale_dtype"]


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
