"""The weights of a checkpoint that adapters can be of, quantised or not, with their shapes.

Source: ``docs/format.md``; ``PreTrainedModel.tie_weights`` in ``transformers/modeling_utils.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from int4_lora.integration.checkpoint.open import FLOATS, Checkpoint
from int4_lora.integration.checkpoint.tied_embeddings import find_vocabulary, is_tied

__all__ = ["BaseWeights"]


class BaseWeights:
    """The names of a checkpoint's weights; each shape is read once, when it is first asked for.

    A head that is tied to the embeddings is a weight too, though no tensor stores it: the head's
    weight is that of the embeddings.

    Args:
        checkpoint: the base model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        plain = (name for name in checkpoint.tensors if name.endswith(".weight"))
        self.names = {*checkpoint.schemes, *(name.removesuffix(".weight") for name in plain)}
        self.vocabulary = find_vocabulary(checkpoint)
        self._stored_as: dict[str, str] = {}
        if self.vocabulary and not self.vocabulary.head_is_stored and self.is_tied:
            self._stored_as[self.vocabulary.head] = self.vocabulary.embeddings
        self.names.update(self._stored_as)
        self._shapes: dict[str, tuple[int, ...] | None] = {}

    @functools.cached_property
    def is_tied(self) -> bool:
        """Whether the head is tied to the embeddings; if both are stored, they are compared."""
        return self.vocabulary is not None and is_tied(self.checkpoint, self.vocabulary)

    @property
    def model_types(self) -> set[str]:
        """Every ``model_type`` of config.json, also those of its parts such as ``text_config``."""
        return set(_model_types(self.checkpoint.config))

    def name_in_base(self, module: str) -> str:
        """Return the base's name of a module: that of its head for ``lm_head``, if none is stored.

        Args:
            module: the module's name in an adapter.
        """
        return next(iter(self._stored_as), module) if _last(module) == "lm_head" else module

    def stored_name(self, module: str) -> str:
        """Return the module whose weight is stored: the embeddings for a head that is not.

        Args:
            module: the module's name in the base.
        """
        return self._stored_as.get(module, module)

    def has_matrix(self, module: str) -> bool:
        """Return whether a module has a weight of two dimensions, packed, dense or tied."""
        module = self.stored_name(module)
        if module in self.checkpoint.schemes:
            return True
        stored = self.checkpoint.tensors.get(f"{module}.weight")
        return stored is not None and len(stored.shape) == 2

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Return the dense shape of a module's weight; None if no tensor tells it."""
        if module not in self._shapes:
            self._shapes[module] = self._read_shape(self.stored_name(module))
        return self._shapes[module]

    def matrix_shape(self, module: str, where: str) -> tuple[int, int]:
        """Return ``(out_features, in_features)`` of a weight that can be changed.

        Args:
            module: the module's name in the base.
            where: the beginning of the error message.

        Raises:
            ValueError: there is no such weight, or it is in a format that cannot be changed.
        """
        checkpoint, name = self.checkpoint, self.stored_name(module)
        if name in checkpoint.schemes:
            if not checkpoint.is_packed(name) and not checkpoint.is_float4(name):
                scheme = checkpoint.schemes[name]
                kind = f"{scheme.format} of {scheme.kind}, {scheme.bits} bits"
                raise ValueError(
                    f"{where}: it is {kind}, in {checkpoint.path}, which is not merged into"
                )
            return checkpoint.shape_of(name)
        stored = checkpoint.tensors.get(f"{name}.weight")
        if stored is None:
            raise ValueError(f"{where}: {checkpoint.path} has no such weight")
        if len(stored.shape) != 2 or stored.dtype not in FLOATS:
            actual = f"{stored.dtype} {list(stored.shape)}"
            raise ValueError(
                f"{where}: its weight must be a floating matrix, the base has {actual}"
            )
        return stored.shape[0], stored.shape[1]

    def _read_shape(self, name: str) -> tuple[int, ...] | None:
        checkpoint = self.checkpoint
        if name in checkpoint.schemes and (
            checkpoint.is_packed(name) or checkpoint.is_float4(name)
        ):
            return checkpoint.shape_of(name)
        stored = checkpoint.tensors.get(f"{name}.weight")
        return None if stored is None else tuple(stored.shape)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key == "model_type" and isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _model_types(value)
