"""Keep DistributedDataParallel from sending packed weights between processes.

DDP broadcasts every buffer when it is made, and again in every forward. Packed weights are frozen,
and each process has read them from the checkpoint. DDP leaves out the names that it finds in
``_ddp_params_and_buffers_to_ignore`` of the module that it is given. They are full names in that
module, which PEFT, ``torch.compile`` or a script may have put around the model, so they are
collected when DDP is made.

Source: ``torch/nn/parallel/distributed.py``, torch 2.8 to 2.15.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from int4_lora.integration.huggingface.int4_experts import Int4Experts
from int4_lora.integration.huggingface.int4_linear import Int4Linear

__all__ = ["packed_buffers", "register"]

MARK = "_int4_lora"
IGNORED = "_ddp_params_and_buffers_to_ignore"


def packed_buffers(module: nn.Module) -> list[str]:
    """Return the full names of the packed tensors of all INT4 layers in a module.

    Example:
        >>> import torch
        >>> from int4_lora.reference import quantize
        >>> layer = Int4Linear(quantize(torch.randn(32, 256), group_size=128))
        >>> packed_buffers(nn.Sequential(layer))[0]
        '0.int4_words'
    """
    return [
        f"{path}.{name}" if path else name
        for path, layer in module.named_modules()
        if isinstance(layer, Int4Linear | Int4Experts)
        for name in layer.packed_names
    ]


def register() -> None:
    """Make DDP leave packed weights out; a second call changes nothing."""
    create = DistributedDataParallel.__init__
    if hasattr(create, MARK):
        return

    @functools.wraps(create)
    def init(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        names = packed_buffers(module)
        if names:
            names += getattr(module, IGNORED, ())
            mark: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            mark(module, names)
        create(self, module, *args, **kwargs)

    setattr(init, MARK, True)
    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]
