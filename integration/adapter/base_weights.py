"""The weights of a checkpoint that adapters can be of, quantised or not, with their shapes.

Source: ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.tied_embeddings import find_vocabulary, is_tied

__all__ = ["BaseWeights"]


class BaseWeights:
    """The names of a checkpoint's weights; each shape is read once, when it is first asked for.

    A head that is tied to the embeddings is a weight too, though no tensor stores it.

    Args:
        checkpoint: the base model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        plain = (name for name in checkpoint.tensors if name.endswith(".weight"))
        self.names = {*checkpoint.schemes, *(name.removesuffix(".weight") for name in plain)}
        vocabulary = find_vocabulary(checkpoint)
        if vocabulary and not vocabulary.head_is_stored and is_tied(checkpoint, vocabulary):
            self.names.add(vocabulary.head)
        self._shapes: dict[str, tuple[int, ...] | None] = {}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the dense shape of the weight ``name``; None if no tensor tells it."""
        if name not in self._shapes:
            self._shapes[name] = self._read_shape(name)
        return self._shapes[name]

    @property
    def model_types(self) -> set[str]:
        """Every ``model_type`` of config.json, also those of its parts such as ``text_config``."""
        return set(_model_types(self.checkpoint.config))

    def _read_shape(self, name: str) -> tuple[int, ...] | None:
        checkpoint = self.checkpoint
        if name in checkpoint.schemes and checkpoint.is_packed(name):
            return checkpoint.shape_of(name)
        stored = checkpoint.tensors.get(f"{name}.weight")
        return None if stored is None else tuple(stored.shape)


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _model_types(value)
