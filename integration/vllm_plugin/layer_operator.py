"""A layer as a single operator within vLLM's own torch.compile.

vLLM compiles a graph for any number of tokens, in which a choice by that number would be made once.
An operator chooses each time it runs, and a CUDA graph captures the choice for its size.

The operator finds its layer by name. vLLM's ``LayerName`` makes the name an input of the graph: a
plain string would be part of it, so that no two layers of a model could share a graph.

The schema of the operator is made of the annotations, which may not be strings.

Source: vLLM's ``vllm/utils/torch_utils.py`` and its operator ``vllm::unified_attention``.
"""

# pyright: reportMissingImports=false

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils import torch_utils

if TYPE_CHECKING:
    from int4_lora.integration.vllm_plugin.served_experts import ServedExperts
    from int4_lora.integration.vllm_plugin.served_layer import ServedLayer

    LayerName = str
else:
    LayerName = torch_utils.LayerNameType

__all__ = ["run_by_name", "run_experts_by_name"]

NAMESPACE = torch.library.Library(  # the operator lives as long as it
    "int4_lora", "FRAGMENT"
)  # type: ignore[no-untyped-call]


def run_by_name(
    served: "ServedLayer", x: Tensor, adapter_ids: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return a layer as the operator computes it.

    Args:
        served: the layer; the operator finds it in vLLM's forward context.
        x: ``[tokens, in_features]``.
        adapter_ids: int64 ``[tokens]`` or None.
        bias: ``[out_features]`` or None.
    """
    weight = served.weight or served.shared
    assert weight is not None
    name = torch_utils._encode_layer_name(served.name_in_graph)
    y: Tensor = torch.ops.int4_lora.linear(x, adapter_ids, bias, name, weight.out_features)
    return y


def run_experts_by_name(
    served: "ServedExperts",
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    adapter_ids: Tensor | None,
) -> Tensor:
    """Return the experts of a layer as the operator computes them.

    Args:
        served: the experts; the operator finds them in vLLM's forward context.
        x: ``[tokens, hidden]``.
        topk_ids: int ``[tokens, k]``.
        topk_weights: ``[tokens, k]``.
        adapter_ids: int64 ``[tokens]`` or None.
    """
    name = torch_utils._encode_layer_name(served.name_in_graph)
    y: Tensor = torch.ops.int4_lora.experts(x, topk_ids, topk_weights, adapter_ids, name)
    return y


def _linear(
    x: Tensor,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
    layer: LayerName,
    out_features: int,
) -> Tensor:
    name = torch_utils._resolve_layer_name(layer)
    served: ServedLayer = get_forward_context().no_compile_layers[name]
    return served.forward(x, adapter_ids, bias)


def _shape_of_linear(
    x: Tensor,
    adapter_ids: Tensor | None,
    bias: Tensor | None,
    layer: LayerName,
    out_features: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


torch_utils.direct_register_custom_op(
    "linear", _linear, fake_impl=_shape_of_linear, target_lib=NAMESPACE
)


def _experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    adapter_ids: Tensor | None,
    layer: LayerName,
) -> Tensor:
    name = torch_utils._resolve_layer_name(layer)
    served: ServedExperts = get_forward_context().no_compile_layers[name]
    return served.forward(x, topk_ids, topk_weights, adapter_ids)


def _shape_of_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    adapter_ids: Tensor | None,
    layer: LayerName,
) -> Tensor:
    return torch.empty_like(x)


torch_utils.direct_register_custom_op(
    "experts", _experts, fake_impl=_shape_of_experts, target_lib=NAMESPACE
)
