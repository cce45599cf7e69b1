"""The state of torch in which requests are served, for graphs compiled while a model loads.

While vLLM builds a model, the default dtype is the model's and a default device is set. A graph
compiled in that state would be compiled again at the first request.

Source: ``torch.overrides`` for modes; vLLM's ``BaseModelLoader.load_model`` for what it sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.overrides import _pop_mode_temporarily

__all__ = ["as_when_serving"]


@contextmanager
def as_when_serving() -> Iterator[None]:
    """Set inference mode, float32 as default dtype and no torch function modes."""
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, before)
        stack.enter_context(torch.inference_mode())
        yield
