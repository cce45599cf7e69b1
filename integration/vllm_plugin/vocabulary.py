"""Adapters on embeddings and on lm_head, on a CPU.

These layers stay vLLM's own, but call the operators below in place of vLLM's. vLLM <= 0.32's CPU
operators treat -1, a token without an adapter, as the last slot; and they copy an adapter for every
token even where no adapter has weights for the layer.

Source: vLLM's ``PunicaWrapperCPU.add_lora_logits`` and ``add_lora_embedding``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

__all__ = ["VocabularyAdapters", "patch_vocabulary_lora"]


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
    if module.lora_b_stacked.device.type != "cpu":
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
