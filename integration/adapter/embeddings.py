"""Read what PEFT trained for an embedding: a pair of matrices.

With W ``[num_embeddings, embedding_dim]`` PEFT adds
``scaling * (lora_embedding_B @ lora_embedding_A).T``, which is ``scaling * b @ a`` of the pair
a = lora_embedding_B.T, b = lora_embedding_A.T.

With ``ensure_weight_tying`` it saves the same pair again for the head that is tied to the
embeddings: a copy, and no target of its own.

Source: ``Embedding.get_delta_weight`` in ``peft/tuners/lora/layer.py``;
``LoraModel._add_targets_to_tie`` in ``peft/tuners/lora/model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from int4_lora.integration.adapter.adapter import AdapterModule
from int4_lora.integration.adapter.config import rank_of, scaling_of
from int4_lora.integration.adapter.keys import KeyedTensor
from int4_lora.integration.adapter.pairs import read_pair, where_of
from int4_lora.integration.adapter.targeting import is_targeted

__all__ = ["EMBEDDINGS", "embedding_module", "is_copy_for_tied_head"]

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")  # in models of transformers


def embedding_module(
    config: Mapping[str, Any], name: str, pair: Mapping[str, KeyedTensor]
) -> AdapterModule:
    """Read the pair of an embedding.

    Args:
        config: the content of adapter_config.json.
        name: the embedding's name.
        pair: lora_embedding_A ``[rank, num_embeddings]`` and lora_embedding_B
            ``[embedding_dim, rank]``, under "A" and "B".

    Returns:
        The pair of the weight ``[num_embeddings, embedding_dim]``.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: the config does not target the embedding, or has another rank.
    """
    where = where_of(name, pair)
    a, b = read_pair(name, pair)
    if not is_targeted(config, name):
        raise ValueError(f"{where}: adapter_config.json does not target it: PEFT would ignore it")
    rank = rank_of(config, name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: lora_embedding_A must be [{rank}, num_embeddings] and lora_embedding_B "
            f"[embedding_dim, {rank}] by the config's rank, got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    return AdapterModule(b.T.contiguous(), a.T.contiguous(), scaling_of(config, name))


def is_copy_for_tied_head(
    config: Mapping[str, Any],
    name: str,
    pair: Mapping[str, KeyedTensor],
    embeddings: Mapping[str, AdapterModule],
) -> bool:
    """Return whether a pair is the copy that PEFT saves for a head tied to the embeddings.

    Args:
        config: the content of adapter_config.json.
        name: the name of the pair's module.
        pair: its lora_A and lora_B, under "A" and "B".
        embeddings: the pairs of the embeddings, by name.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: a matrix is missing, or the pair is of a tied head and differs from that of the
            embeddings.
    """
    if not config.get("ensure_weight_tying") or not embeddings or is_targeted(config, name):
        return False
    a, b = read_pair(name, pair)
    scaling = scaling_of(config, name)
    for one in embeddings.values():
        if torch.equal(a, one.a) and torch.equal(b, one.b) and scaling == one.scaling:
            return True
    raise ValueError(
        f"{where_of(name, pair)}: ensure_weight_tying is set and target_modules does not name it, "
        "so that pair and scaling must equal those of the embeddings, and they differ"
    )
