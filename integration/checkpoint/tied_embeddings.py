"""Find a model's embeddings and its head, and whether the head is tied to the embeddings.

A tied head is no tensor of its own: it is the weight of the embeddings. transformers ties them if
``tie_word_embeddings`` is true, which is the default of many models. If both are stored and differ,
it does not tie them.

Source: ``PreTrainedModel.tie_weights`` in ``transformers/modeling_utils.py``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from int4_lora.integration.checkpoint.open import Checkpoint

__all__ = ["Vocabulary", "find_vocabulary", "is_tied", "may_be_tied_to", "ties_of", "untied"]

EMBEDDINGS = re.compile(r"(?P<prefix>.*\.)?(?P<last>embed_tokens|wte|word_embeddings|embed_in)")
WITH_HEAD = re.compile(r"(.*\.)?(language_model|text_model)\.model\.")  # the head lies beside it
NO_PREFIX = re.compile(  # of embeddings in models whose head has none
    r"(model\.)?((language_model|text_model)\.)?|model\.decoder\.|transformer\.|gpt_neox\."
)
NO_HEAD = re.compile(  # such as LlamaModel, which embeds texts
    r".*((?<!LMHead)(?<!Chat)Model|For(Sequence|Token)Classification|ForQuestionAnswering)"
)
HEADS = ("lm_head", "embed_out")
TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Vocabulary:
    """The two modules of a model that have a row per token.

    Args:
        embeddings: the name of the input embeddings.
        head: the name of the head.
        head_is_stored: whether the checkpoint has a weight of the head, packed or not.
    """

    embeddings: str
    head: str
    head_is_stored: bool


def find_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """Return the names of the embeddings and of the head; None if they are not certain.

    Args:
        checkpoint: an open checkpoint.
    """
    names = _matrices(checkpoint)
    found = [match for name in names if (match := EMBEDDINGS.fullmatch(name))]
    if len(found) != 1:
        return None
    last = "embed_out" if found[0]["last"] == "embed_in" else "lm_head"
    head = _head_of(found[0]["prefix"] or "", last, names)
    if head is None:
        return None
    stored = head in checkpoint.schemes or f"{head}.weight" in checkpoint.tensors
    return Vocabulary(found[0][0], head, stored)


def may_be_tied_to(checkpoint: Checkpoint, module: str) -> bool:
    """Return whether a head that is not stored may be tied to a module.

    Args:
        checkpoint: an open checkpoint, of which ``find_vocabulary`` is not certain.
        module: the module's name.
    """
    lasts = {name.rpartition(".")[2] for name in _matrices(checkpoint)}
    is_embedding = EMBEDDINGS.fullmatch(module) is not None
    return is_embedding and lasts.isdisjoint(HEADS) and _ties_a_head(checkpoint.config)


def _matrices(checkpoint: Checkpoint) -> dict[str, None]:
    """Return the modules whose weight is a matrix, packed or not."""
    dense = (
        name.removesuffix(".weight")
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    )
    return dict.fromkeys((*checkpoint.schemes, *dense))


def _head_of(prefix: str, last: str, names: Collection[str]) -> str | None:
    """Return the head of the embeddings with a prefix; None if its name does not follow from it.

    Where the prefix is of no layout that is known, the head is the one that is stored.
    """
    if WITH_HEAD.fullmatch(prefix):
        return prefix.removesuffix("model.") + last
    if NO_PREFIX.fullmatch(prefix):
        return last
    parts = prefix.split(".")[:-1]
    outer = ("".join(f"{part}." for part in parts[:count]) for count in range(len(parts)))
    stored = [f"{one}{last}" for one in outer if f"{one}{last}" in names]
    return stored[0] if len(stored) == 1 else None


def is_tied(checkpoint: Checkpoint, vocabulary: Vocabulary) -> bool:
    """Return whether the head is tied to the embeddings.

    Args:
        checkpoint: an open checkpoint.
        vocabulary: its embeddings and its head. If both are stored, their values are compared.
    """
    if not vocabulary.head_is_stored:
        return _ties_a_head(checkpoint.config)
    is_packed = {vocabulary.head, vocabulary.embeddings} & {*checkpoint.schemes}
    if is_packed or True not in ties_of(checkpoint.config):
        return False
    names = (f"{vocabulary.embeddings}.weight", f"{vocabulary.head}.weight")
    embeddings, head = (checkpoint.tensor(name) for name in names)
    return torch.equal(embeddings, head)


def _ties_a_head(config: Mapping[str, Any]) -> bool:
    """Return whether a model without a stored head has one that is tied."""
    ties, models = ties_of(config), config.get("architectures") or ()
    is_headless = bool(models) and all(NO_HEAD.fullmatch(str(model)) for model in models)
    return (True in ties or not ties) and not is_headless


def ties_of(config: Mapping[str, Any]) -> set[bool]:
    """Return what a config and its parts say of ``tie_word_embeddings``.

    Args:
        config: the content of config.json.

    Example:
        >>> ties_of({"text_config": {"tie_word_embeddings": True}})
        {True}
    """
    return {part[TIE] for part in _texts(config) if type(part.get(TIE)) is bool}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of a model whose head is not tied.

    Args:
        config: the content of config.json.

    Example:
        >>> untied({"model_type": "gemma2"})
        {'model_type': 'gemma2', 'tie_word_embeddings': False}
    """
    result = copy.deepcopy(dict(config))
    for part in _texts(result):
        part[TIE] = False
    return result


def _texts(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a config, and the parts of it that are of text models."""
    yield config
    for key, part in config.items():
        if isinstance(part, dict) and (TIE in part or key in ("text_config", "language_config")):
            yield part
