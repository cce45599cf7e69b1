"""The layer as one operator within vLLM's own torch.compile.

vLLM compiles one graph for any number of tokens, in which a choice by that number would be made
once. An operator makes it each time it runs, and a CUDA graph captures what it chose for its size.

Source: ``torch.library.custom_op``; vLLM's ``lora_linear_async`` for finding a layer by its name.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import torch
from torch import Tensor

from int4_lora.integration.vllm_plugin.served_layer import ServedLayer

__all__ = ["graph_name", "linear"]


def graph_name(name: str) -> str:
    """Return the name that a layer is found by, apart from the names of vLLM's own layers."""
    return f"{name}.int4_lora"


@torch.library.custom_op("int4_lora::linear", mutates_args=())
def linear(
    x: Tensor, adapter_ids: Tensor | None, bias: Tensor | None, layer: str, out_features: int
) -> Tensor:
    """Run a layer by its name: x ``[tokens, in_features]`` to ``[tokens, out_features]``."""
    from vllm.forward_context import get_forward_context

    served = get_forward_context().no_compile_layers[layer]
    assert isinstance(served, ServedLayer)
    if adapter_ids is None:
        return served.base(x, bias)
    return served.with_adapters(x, adapter_ids, bias)


@linear.register_fake
def _(
    x: Tensor, adapter_ids: Tensor | None, bias: Tensor | None, layer: str, out_features: int
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)
