"""Record that a packed head is dense after ``resize_token_embeddings``.

transformers makes a new dense head of another size from the ``weight`` of the old one. The model's
config would still call the head INT4, and the saved model would not load. So the one function of
transformers that resizes heads is wrapped: a head that was an ``Int4Linear`` is recorded as dense,
and a warning names it. For every other head the function is what it was.

Source: ``PreTrainedModel._get_resized_lm_head`` of transformers 4.56 to 5.24.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from int4_lora.integration.huggingface.dense_record import forget_quantizer
from int4_lora.integration.huggingface.int4_linear import Int4Linear

__all__ = ["register"]

MARK = "_int4_lora"


def register() -> None:
    """Make transformers record that it made a packed head dense; a second call changes nothing."""
    resize: Any = PreTrainedModel._get_resized_lm_head
    if hasattr(resize, MARK):
        return

    @functools.wraps(resize)
    def get_resized_lm_head(self: Any, old_lm_head: nn.Module, *args: Any, **kwargs: Any) -> Any:
        head = resize(self, old_lm_head, *args, **kwargs)
        if isinstance(old_lm_head, Int4Linear) and head is not old_lm_head:
            _became_dense(self, old_lm_head)
        return head

    setattr(get_resized_lm_head, MARK, True)
    PreTrainedModel._get_resized_lm_head = get_resized_lm_head


def _became_dense(model: nn.Module, head: Int4Linear) -> None:
    """Record and report that the head of a model is dense now."""
    if head.record is None or head.name is None:
        return
    head.record.became_dense(head.name)
    forget_quantizer(model)
    warnings.warn(
        f"{head.name} was INT4; resized, it is dense, in {head.weight.dtype}", stacklevel=5
    )
