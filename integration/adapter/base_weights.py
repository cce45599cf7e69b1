"""The weights of a checkpoint that adapters can be of, quantised or not, with their shapes.

Source: ``docs/format.md``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.tied_embeddings import find_vocabulary, is_tied

__all__ = ["BaseWeights"]


class BaseWeights:
    """The names of a checkpoint's weights; each shape is read once, when it is first asked for.

    Args:
        checkpoint: the base model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        plain = (name for name in checkpoint.tensors if name.endswith(".weight"))
        self.names = {*checkpoint.schemes, *(name.removesuffix(".weight") for name in plain)}
        self._shapes: dict[str, tuple[int, ...] | None] = {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the dense shape of the weight ``name``; None if only its format could tell."""
        if name not in self._shapes:
            self._shapes[name] = self._read_shape(name)
        return self._shapes[name]

    def is_tied(self, name: str) -> bool:
        """Return whether ``name`` is a head that the base does not store: it is the embedding."""
        return (
            name not in self.names and name.rpartition(".")[2] == "lm_head" and self._has_tied_head
        )

    @functools.cached_property
    def _has_tied_head(self) -> bool:
        vocabulary = find_vocabulary(self.checkpoint)
        is_absent = vocabulary is not None and not vocabulary.head_is_stored
        return vocabulary is not None and is_absent and is_tied(self.checkpoint, vocabulary)

    @property
    def model_types(self) -> set[str]:
        """The ``model_type`` of config.json and of its parts, such as ``text_config``."""
        config = self.checkpoint.config
        parts: Sequence[object] = (config, *config.values())
        types = (part.get("model_type") for part in parts if isinstance(part, dict))
        return {name for name in types if isinstance(name, str)}

    def _read_shape(self, name: str) -> tuple[int, ...] | None:
        checkpoint = self.checkpoint
        if name in checkpoint.schemes and checkpoint.is_packed(name):
            return checkpoint.shape_of(name)
        stored = checkpoint.tensors.get(f"{name}.weight")
        return None if stored is None else tuple(stored.shape)
