"""Keep a model's ``quantization_config`` true when some of its INT4 layers become dense.

Merging adapters makes layers dense, and so does resizing a head. A saved model whose config still
calls them INT4 would be loaded with random weights in their place. So they are added to ``ignore``;
when no quantised layer is left, the config loses its ``quantization_config``.

Source: ``ignore`` in compressed-tensors' ``QuantizationConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from int4_lora.integration.huggingface.dense_experts import without_decompression

__all__ = ["DenseRecord", "forget_quantizer"]

BEFORE = "_pre_quantization_dtype"  # transformers 4.57 cannot save it without quantization_config


class DenseRecord:
    """The INT4 layers of a model, and the config that describes them.

    Args:
        config: the model's config.
        stored: the checkpoint's name of each packed layer, by its name in the model.
        others: whether the model has further quantised layers.
    """

    def __init__(self, config: Any, stored: Mapping[str, str], *, others: bool) -> None:
        self.config, self.stored, self.others = config, dict(stored), others

    def became_dense(self, *layers: str) -> None:
        """Record that layers are dense now.

        Args:
            layers: the layers' names in the model.
        """
        names = [one for name in layers for one in (name, self.stored.pop(name, name))]
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None:
            return
        if not self.stored and not self.others:
            del self.config.quantization_config
            for config in (self.config, *vars(self.config).values()):  # also the towers' own
                getattr(config, "__dict__", {}).pop(BEFORE, None)
            return
        inner = getattr(quantization, "quantization_config", quantization)
        listed = inner.get("ignore") if isinstance(inner, dict) else inner.ignore
        ignore = list(dict.fromkeys([*(listed or ()), *names]))
        if isinstance(inner, dict):
            inner["ignore"] = ignore
        else:
            inner.ignore = ignore


def forget_quantizer(model: nn.Module) -> None:
    """Make a model whose layers are all dense one that transformers calls not quantised.

    A quantised model cannot be cast by ``half()``, and ``Trainer`` refuses to train it without
    adapters. A model whose config still has a ``quantization_config`` stays as it is.

    Args:
        model: a model of transformers.

    Source:
        ``HfQuantizer.remove_quantization_config`` of transformers.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        return
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model.__dict__["_weight_conversions"] = [without_decompression(one) for one in conversions]
    model.is_quantized = False  # type: ignore[assignment]
    for module in model.modules():
        getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)
