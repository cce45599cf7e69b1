"""Adapters on embeddings and on lm_head, on a CPU.

These layers stay vLLM's own. Where vLLM's CPU operators are wrong, they call the operators below:
vLLM <= 0.32's treat -1, a token without an adapter, as the last slot.

Source: vLLM's ``PunicaWrapperCPU.add_lora_logits`` and ``add_lora_embedding``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import LogitsProcessorWithLoRA, LoRAMapping, VocabParallelEmbeddingWithLoRA
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

__all__ = ["VocabularyAdapters", "adds_to_rows_without_an_adapter", "patch_vocabulary_lora"]


@functools.cache
def adds_to_rows_without_an_adapter() -> bool:
    """Return whether vLLM's operators for CPUs add an adapter to rows that have none.

    Those for embeddings, lm_heads and linear layers are asked, wherever torch's default device is.
    """
    mapping = LoRAMapping(index_mapping=(7, 0), prompt_mapping=(7, 0))
    with torch.device("cpu"):
        for mapping.is_prefill in (True, False):
            operators = PunicaWrapperCPU(2, 2, torch.device("cpu"))
            operators.update_metadata(mapping, [7], 1, 1)
            x, weight, y = torch.ones(2, 1), torch.ones(1, 1, 1, 1), torch.zeros(3, 2, 1)
            operators.add_lora_embedding(y[0], x, weight)
            operators.add_lora_logits(y[1], x, weight, weight, 1.0)
            operators.add_lora_linear(y[2], x, (weight,), (weight,), 1.0, (1,))
            if bool(y[:, 1].any()):
                return True
    return False


class VocabularyAdapters:
    """vLLM's operators as these layers call them, two of them replaced.

    Args:
        operators: vLLM's punica wrapper.
    """

    def __init__(self, operators: Any) -> None:
        self.operators = operators
        self.slots: set[int] = set()  # those that hold weights for the layer

    def __getattr__(self, name: str) -> Any:
        """Return everything else from vLLM's operators."""
        return getattr(self.operators, name)

    def add_lora_logits(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, **_: Any
    ) -> None:
        """Add the adapters' logits to ``y``, in place.

        Args:
            y: ``[rows, vocabulary]``, padded or not.
            x: ``[rows, hidden]``.
            a: ``[slots, 1, rank, hidden]``.
            b: ``[slots, 1, vocabulary, rank]``.
            scale: a factor of the logits that are added.

        Raises:
            ValueError: log-probabilities of prompts are asked for while several requests run: vLLM
                does not say which rows belong to which request.
        """
        if not self.slots:
            return
        ids = self.operators.sampler_indices
        if len(ids) not in (1, len(x)):
            raise ValueError(
                f"int4_lora: prompt_logprobs with an adapter on lm_head: {len(x)} rows of "
                f"{len(ids)} requests; ask for them one request at a time"
            )
        ids = ids.expand(len(x))
        width = min(y.shape[1], b.shape[2])
        for slot in self.slots:
            rows = ids == slot
            if rows.any():
                h = x[rows].float() @ a[slot, 0].float().T * scale
                y[rows, :width] += (h @ b[slot, 0, :width].float().T).to(y.dtype)

    def add_lora_embedding(self, y: Tensor, x: Tensor, b: Tensor, **_: Any) -> None:
        """Add the adapters' embeddings to ``y``, in place.

        Args:
            y: ``[tokens, hidden]``.
            x: ``[tokens, rank]``, from each token's own A.
            b: ``[slots, 1, hidden, rank]``.
        """
        ids = self.operators._token_lora_indices[: x.shape[0]]
        for slot in self.slots:
            rows = ids == slot
            if rows.any():
                y[rows] += (x[rows].float() @ b[slot, 0].float().T).to(y.dtype)


def patch_vocabulary_lora(module: Any) -> None:
    """Put ``VocabularyAdapters`` between vLLM's operators and such a layer on a CPU."""
    if not isinstance(module, (LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA)):
        return
    if isinstance(module.punica_wrapper, VocabularyAdapters):
        return
    if module.lora_b_stacked.device.type != "cpu" or not adds_to_rows_without_an_adapter():
        return
    adapters = VocabularyAdapters(module.punica_wrapper)
    module.punica_wrapper = adapters
    module.set_lora = _then(module.set_lora, adapters.slots.add)
    module.reset_lora = _then(module.reset_lora, adapters.slots.discard)


def _then(method: Callable[..., None], note: Callable[[int], None]) -> Callable[..., None]:
    """Return a method of a slot after which the slot is noted."""

    @functools.wraps(method)
    def call(index: int, *args: Any, **kwargs: Any) -> None:
        method(index, *args, **kwargs)
        note(index)

    return call
