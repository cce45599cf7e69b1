"""Tell what each key of an adapter's file is: a matrix of which layer, or another tensor.

PEFT writes ``base_model.model.``, the layer's name, and ``lora_A.weight``. Other tools leave the
prefix out, keep the adapter's name (``lora_A.default.weight``), or save a model that is wrapped for
torch.compile, FSDP or activation checkpointing, whose wrappers add a part to each name.

Source: ``get_peft_model_state_dict`` in ``peft/utils/save_and_load.py``; for the wrappers
``torch/_dynamo/eval_frame.py``, ``torch/distributed/fsdp/_common_utils.py`` and
``torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from int4_lora.integration.adapter.int4_form import PACKED_KEY, Int4Form
from int4_lora.integration.checkpoint.safetensors_files import read_tensor
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.reference import dequantize

__all__ = ["Int4Tensor", "KeyedTensor", "SortedKeys", "keyed_tensors", "sort_keys"]

ROOT = "base_model.model."
NAME = r"(\.(?P<adapter>[^.]+))?"
PAIR = re.compile(rf"(?P<module>.+)\.lora_(?P<matrix>[AB]){NAME}\.weight")
EMBEDDING = re.compile(rf"(?P<module>.+)\.lora_embedding_(?P<matrix>[AB]){NAME}")
TOKENS = re.compile(rf"(?P<module>.+)\.token_adapter\.trainable_tokens_delta{NAME}")
WHOLE = re.compile(r"(?P<module>.+?)(\.token_adapter)?(\.base_layer)?\.(?P<part>weight|bias)")
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
OTHERS = {
    ".lora_magnitude_vector": "it belongs to DoRA",
    ".lora_diag": "it belongs to KaSA",
    ".lora_B.bias": "B has a bias (lora_bias)",
    ".lora_a": "torchtune, MLX and others write it, whose layers have other names and shapes",
    ".lora_b": "torchtune, MLX and others write it, whose layers have other names and shapes",
    ".lora_": "it belongs to a variant of LoRA",
    ".alpha": (
        "it is a scaling as kohya's trainer stores it; put lora_alpha or alpha_pattern into "
        "adapter_config.json and remove the key"
    ),
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
class Int4Tensor(KeyedTensor):
    """A matrix of an adapter's file that is stored in INT4, not read yet.

    Args:
        key: the key that the matrix would have in floats.
        stored: where one of its tensors lies.
        parts: where each of its tensors lies, by the end of its key.
        form: how it is quantised.
    """

    parts: Mapping[str, StoredTensor]
    form: Int4Form

    def read(self) -> Tensor:
        """Read the matrix to the CPU, dequantised, in the dtype of its scale.

        Raises:
            TypeError: a tensor has the wrong dtype.
            ValueError: a tensor is missing, is not of the form or has the wrong shape, or the file
                changed.
        """
        parts = {
            part: read_tensor(stored, f"{self.key}_{part}") for part, stored in self.parts.items()
        }
        try:
            return dequantize(self.form.weight(parts))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class SortedKeys:
    """The tensors of an adapter, by what they are; names have no prefix and no wrapper's part.

    Args:
        pairs: lora_A and lora_B of each module, under "A" and "B"; a module's name may end in
            ``.base_layer`` where PEFT wrapped a module's second parameter.
        embeddings: lora_embedding_A and lora_embedding_B of each module, under "A" and "B".
        tokens: trainable_tokens_delta of each module.
        whole: whole tensors, by their full name in the base (``base_layer`` removed).
        wrapped: modules' names with the parts of wrappers, by the name without.
        notes: what was left out of the names, one sentence each.
    """

    pairs: dict[str, dict[str, KeyedTensor]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, KeyedTensor]] = field(default_factory=dict)
    tokens: dict[str, KeyedTensor] = field(default_factory=dict)
    whole: dict[str, KeyedTensor] = field(default_factory=dict)
    wrapped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def keyed_tensors(
    stored: Mapping[str, StoredTensor], form: Int4Form | None = None
) -> list[KeyedTensor]:
    """Return the tensors of an adapter; those of a matrix in INT4 together.

    Args:
        stored: the adapter's tensors by their keys.
        form: how its pairs are stored by its config; None for floats.

    Raises:
        ValueError: keys and config contradict each other, or a matrix is stored twice.
    """
    matches = {key: PACKED_KEY.fullmatch(key) for key in stored}
    packed = {key: match for key, match in matches.items() if match}
    if packed and form is None:
        raise ValueError(
            f"{_where(stored, packed)} is of an adapter in INT4, whose config must say so: "
            "peft_type LORA_INT4"
        )
    if form is not None and not packed:
        raise ValueError(
            f"{_where(stored, stored)} is of an adapter in floats, and its config says "
            f"{form.describe()}"
        )
    parts: dict[str, dict[str, StoredTensor]] = {}
    for key, match in packed.items():
        parts.setdefault(match["matrix"], {})[match["part"]] = stored[key]
    keyed = [KeyedTensor(key, tensor) for key, tensor in stored.items() if key not in packed]
    for plain in keyed:
        if plain.key in parts:
            raise ValueError(f"{plain.where} is stored in floats and in INT4")
    if form is None:
        return keyed
    matrices = (Int4Tensor(key, next(iter(of.values())), of, form) for key, of in parts.items())
    return [*keyed, *matrices]


def _where(stored: Mapping[str, StoredTensor], keys: Iterable[str]) -> str:
    """Return the first of some keys with its file, for messages."""
    key = next(iter(keys), None)
    return "the file of tensors" if key is None else f"{stored[key].file}: {key}"


def sort_keys(stored: Mapping[str, StoredTensor], form: Int4Form | None = None) -> SortedKeys:
    """Return the tensors of an adapter by what they are.

    Args:
        stored: the adapter's tensors by their keys.
        form: how its pairs are stored by its config; None for floats.

    Raises:
        ValueError: a key is of a variant of LoRA or unknown, two keys mean the same tensor, keys
            carry different adapters' names, or keys and config contradict each other; the message
            names file and key.
    """
    keys = SortedKeys()
    adapters: dict[str | None, KeyedTensor] = {}
    removed: set[str] = set()
    matches = []
    for keyed in keyed_tensors(stored, form):
        name, parts = _unwrapped(keyed.key)
        match = _match(name, keyed)
        matches.append((match, keyed))
        if "adapter" in match.groupdict():
            adapters.setdefault(match["adapter"], keyed)
        if parts:
            removed |= parts
            keys.wrapped.setdefault(match["module"], _in_memory(keyed.key))
    _check_one_adapter(adapters)
    for match, keyed in matches:
        _put(keys, match, keyed)
    for part in sorted(removed):
        kind = WRAPPERS.get(part, "DistributedDataParallel")
        keys.notes.append(f"{part}, which {kind} adds to names, is left out of the adapter's keys")
    return keys


def _match(name: str, keyed: KeyedTensor) -> re.Match[str]:
    """Return the match of the pattern that a key has."""
    patterns = [PAIR, EMBEDDING, TOKENS] if ".lora_" in f".{name}" else [TOKENS, WHOLE]
    match = next(filter(None, (pattern.fullmatch(name) for pattern in patterns)), None)
    if match is None:
        kind = next((why for mark, why in OTHERS.items() if mark in name), "its kind is unknown")
        rule = "is not lora_A or lora_B of a linear layer"
        raise ValueError(f"{keyed.where} {rule}: {kind}")
    return match


def _put(keys: SortedKeys, match: re.Match[str], keyed: KeyedTensor) -> None:
    """Put a tensor where its key belongs."""
    group, entry = keys.whole, match["module"]
    if match.re is WHOLE:
        entry = f"{match['module']}.{match['part']}"
    elif match.re is TOKENS:
        group = keys.tokens
    else:
        modules = keys.pairs if match.re is PAIR else keys.embeddings
        group, entry = modules.setdefault(match["module"], {}), match["matrix"]
    if entry in group:
        raise ValueError(f"{keyed.where} means the same tensor as {group[entry].key}")
    group[entry] = keyed


def _unwrapped(key: str) -> tuple[str, set[str]]:
    """Return a key without prefix and without the parts of wrappers, and these parts.

    ``module``, which DistributedDataParallel adds in front of all, can be a module's own name, too;
    it is left out only in front of the prefix that PEFT writes.
    """
    parts = key.split(".")
    removed = WRAPPERS.keys() & set(parts)
    name = ".".join(part for part in parts if part not in WRAPPERS)
    if name.startswith(f"module.{ROOT}"):
        name = name.removeprefix("module.")
        removed |= {"module"}
    return name.removeprefix(ROOT), set(removed)


def _in_memory(key: str) -> str:
    """Return the module's name in a key as PEFT met it, with the parts of wrappers."""
    module = re.split(r"\.(lora_|token_adapter\.)", key)[0]
    return module.partition(ROOT)[2] or module


def _check_one_adapter(adapters: Mapping[str | None, KeyedTensor]) -> None:
    """Check that all keys carry the same adapter's name, or none."""
    if len(adapters) > 1:
        listed = ", ".join(f"{name or 'no name'} ({keyed.key})" for name, keyed in adapters.items())
        file = next(iter(adapters.values())).stored.file
        raise ValueError(
            f"{file}: keys carry the names of several adapters: {listed}; save each in a folder "
            "of its own, as PEFT's save_pretrained(..., selected_adapters=[NAME]) does"
        )
