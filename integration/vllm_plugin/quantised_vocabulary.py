"""Quantised embeddings and lm_heads, with adapters elsewhere and on them.

vLLM computes a quantised lm_head like another linear layer, and an embedding by a Triton kernel,
which a CPU does not have. Its LoRA layers ask both for the dtype and device of a dense ``weight``.

Source: vLLM's ``CompressedTensorsEmbeddingWNA16Int``, ``from_layer_logits_processor`` and
``VocabParallelEmbeddingWithLoRA``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from int4_lora.integration.vllm_plugin.loading import keeping_scale_dtype
from int4_lora.reference import unpack

__all__ = ["QuantisedEmbedding", "give_weight_for_lora"]


def give_weight_for_lora(layer: Any) -> None:
    """Give a quantised layer an empty ``weight``, of the default dtype and device.

    While vLLM builds a model, these are the model's.
    """
    layer.weight = torch.empty(0)


class QuantisedEmbedding(QuantizeMethodBase):
    """An embedding whose rows are dequantised where they are looked up.

    Args:
        stock: vLLM's method for the layer, which allocates the checkpoint's tensors.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def create_weights(self, layer: Any, *args: Any, weight_loader: Any, **kwargs: Any) -> None:
        """Allocate the checkpoint's tensors; scales keep the checkpoint's dtype."""
        loader = keeping_scale_dtype(weight_loader, set())
        self.stock.create_weights(layer, *args, weight_loader=loader, **kwargs)
        self.dtype = layer.weight_scale.dtype

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Return the rows of some tokens.

        Args:
            layer: vLLM's embedding.
            input_: int ``[...]``, rows of this rank's part.

        Returns:
            ``[..., hidden]`` in the dtype of the model.
        """
        rows = input_.flatten()  # no PackedWeight: vLLM's graph keeps their number symbolic
        scale = layer.weight_scale[rows]
        codes = unpack(layer.weight_packed[rows], layer.embedding_dim).to(scale.dtype)
        dense = codes.view(*scale.shape, -1) * scale.unsqueeze(2)
        return dense.flatten(1).to(self.dtype).view(*input_.shape, layer.embedding_dim)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Refuse: an embedding multiplies nothing.

        Raises:
            TypeError: always.
        """
        raise TypeError("int4_lora: a quantised embedding is looked up, and multiplies nothing")
