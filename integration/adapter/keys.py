"""Tell what each key of an adapter's file is: a matrix of which layer, or another tensor.

Source: ``get_peft_model_state_dict`` in ``peft/utils/save_and_load.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from int4_lora.integration.checkpoint.safetensors_files import read_tensor
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor

__all__ = ["KeyedTensor", "SortedKeys", "sort_keys"]

# PEFT writes the prefix but no adapter name; other tools omit the prefix or keep the name.
PREFIX = r"(base_model\.model\.)?"
PAIR = re.compile(PREFIX + r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")
EMBEDDING = re.compile(PREFIX + r"(?P<module>.+)\.lora_embedding_(?P<matrix>[AB])(\.default)?")
TOKENS = re.compile(PREFIX + r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta")
WHOLE = re.compile(PREFIX + r"(?P<module>.+?)(\.base_layer)?\.(?P<part>weight|bias)")
VARIANTS = {
    "lora_magnitude_vector": "it belongs to DoRA",
    "lora_": "it belongs to a variant of LoRA",
}


@dataclass(frozen=True)
class KeyedTensor:
    """A tensor of an adapter's file, not read yet.

    Args:
        key: the tensor's key in its file.
        stored: where it lies.
    """

    key: str
    stored: StoredTensor

    @property
    def where(self) -> str:
        """File and key, for messages."""
        return f"{self.stored.file}: {self.key}"

    def read(self) -> Tensor:
        """Read the tensor to the CPU.

        Raises:
            ValueError: torch has no such dtype, or the file changed.
        """
        return read_tensor(self.stored, self.key)


@dataclass(frozen=True)
class SortedKeys:
    """The tensors of an adapter, by what they are.

    Args:
        pairs: lora_A and lora_B of each module, under "A" and "B"; a module's name may end in
            ``.base_layer`` where PEFT wrapped a module's second parameter.
        embeddings: lora_embedding_A and lora_embedding_B of each module, under "A" and "B".
        tokens: trainable_tokens_delta of each module.
        whole: whole tensors, by their full name in the base (``base_layer`` removed).
    """

    pairs: dict[str, dict[str, KeyedTensor]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, KeyedTensor]] = field(default_factory=dict)
    tokens: dict[str, KeyedTensor] = field(default_factory=dict)
    whole: dict[str, KeyedTensor] = field(default_factory=dict)


def sort_keys(stored: Mapping[str, StoredTensor]) -> SortedKeys:
    """Return the tensors of an adapter by what they are.

    Args:
        stored: the adapter's tensors by their keys.

    Raises:
        ValueError: a key is of a variant of LoRA or unknown, or two keys mean the same tensor; the
            message names file and key.
    """
    keys = SortedKeys()
    for key, tensor in stored.items():
        keyed = KeyedTensor(key, tensor)
        if match := PAIR.fullmatch(key):
            _put(keys.pairs.setdefault(match["module"], {}), match["matrix"], keyed)
        elif match := EMBEDDING.fullmatch(key):
            _put(keys.embeddings.setdefault(match["module"], {}), match["matrix"], keyed)
        elif match := TOKENS.fullmatch(key):
            _put(keys.tokens, match["module"], keyed)
        elif "lora_" not in key and (match := WHOLE.fullmatch(key)):
            _put(keys.whole, f"{match['module']}.{match['part']}", keyed)
        else:
            kind = next((why for mark, why in VARIANTS.items() if mark in key), "unknown")
            rule = "is not lora_A or lora_B of a linear layer"
            raise ValueError(f"{keyed.where} {rule}: {kind}")
    return keys


def _put(group: dict[str, KeyedTensor], name: str, keyed: KeyedTensor) -> None:
    if name in group:
        raise ValueError(f"{keyed.where} means the same tensor as {group[name].key}")
    group[name] = keyed
