"""What adapters change in a checkpoint: which weights, by which steps, and whether a tie breaks.

Source: ``docs/commands/merge.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from int4_lora.integration.adapter.adapter import Adapter, Replacement
from int4_lora.integration.adapter.base_weights import BaseWeights
from int4_lora.integration.checkpoint.open import Checkpoint
from int4_lora.integration.checkpoint.quantization_config import CONFIG_KEYS, parts_of
from int4_lora.integration.checkpoint.safetensors_header import StoredTensor
from int4_lora.integration.checkpoint.tied_embeddings import may_be_tied_to, ties_of, untied
from int4_lora.integration.conversion.adapter_steps import replaced_tensors, steps_of
from int4_lora.integration.conversion.deltas import Change
from int4_lora.integration.conversion.dense_modules import MergedTensor
from int4_lora.integration.conversion.replaced_tensors import (
    AddedTensor,
    Overwrite,
    ReplacedTensor,
)
from int4_lora.integration.conversion.tasks import Copy, Task

__all__ = ["Changes", "changes_of"]


@dataclass(frozen=True)
class Changes:
    """What adapters change in a checkpoint.

    Args:
        modules: the steps that change the weight of each module, in order.
        tensors: what replaces other tensors, by name.
        added_head: the names of a head that the result has and the base has not, and of the
            embeddings that its weight starts from; None if there is none.
        unties: whether the result's head and embeddings differ, and the base's config ties them.
    """

    modules: Mapping[str, Sequence[Change]] = field(default_factory=dict)
    tensors: Mapping[str, Replacement] = field(default_factory=dict)
    added_head: tuple[str, str] | None = None
    unties: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the result has that the base has not, one sentence each."""
        if self.added_head is None:
            return ()
        head, embeddings = self.added_head
        return (
            f"{head} is tied to {embeddings} in the base, and an adapter changes them differently: "
            f"the result has {head}.weight, and tie_word_embeddings is false",
        )

    def plain_task(self, name: str, stored: StoredTensor, dtype: torch.dtype | None) -> Task:
        """Return the task of a tensor that belongs to no quantised module.

        Args:
            name: the tensor's name.
            stored: the tensor in its file.
            dtype: the dtype of floating tensors in the result, or None.
        """
        steps = self.modules.get(name.removesuffix(".weight"))
        if steps and name.endswith(".weight"):
            return MergedTensor(name, stored, dtype, steps)
        if name in self.tensors:
            return ReplacedTensor(name, stored, dtype, self.tensors[name].tensor)
        return Copy(name, stored, dtype)

    def added_tasks(self, checkpoint: Checkpoint, dtype: torch.dtype | None) -> tuple[Task, ...]:
        """Return the tasks of tensors that the base does not have.

        Args:
            checkpoint: the base.
            dtype: the dtype of floating tensors in the result, or None.
        """
        if self.added_head is None:
            return ()
        head, embeddings = self.added_head
        stored = checkpoint.tensors[f"{embeddings}.weight"]
        return (AddedTensor(f"{head}.weight", stored, dtype, self.modules.get(head, ())),)

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config of the result, given that of the base.

        A head that is added is dense, and is named where the config says what is not quantised.
        """
        result = untied(config) if self.unties else dict(config)
        if self.added_head is not None:
            for _, part in parts_of(result):
                for quantization in filter(None, map(part.get, CONFIG_KEYS)):
                    ignored = quantization.get("ignore") or []
                    if self.added_head[0] not in ignored:
                        quantization["ignore"] = [*ignored, self.added_head[0]]
        return result


def changes_of(checkpoint: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> Changes:
    """Return what adapters change in a base.

    Args:
        checkpoint: the base.
        adapters: adapters and their factors.

    Raises:
        ValueError: the base lacks a tensor, or has it in another shape or in a format that cannot
            be changed; a pair is not finite; a factor is not 1 and the adapter replaces a tensor;
            two adapters change a tensor that one of them replaces; an adapter changes embeddings,
            and it is not certain which head is tied to them. The message names the tensor.
    """
    base = BaseWeights(checkpoint)
    modules: dict[str, list[Change]] = {}
    tensors: dict[str, Replacement] = {}
    owners: dict[str, Adapter] = {}
    replaced: set[str] = set()
    for adapter, weight in adapters:
        _check_factor(adapter, weight)
        steps, plain = steps_of(base, adapter, weight), replaced_tensors(base, adapter)
        own = {name for name in steps if isinstance(steps[name][0], Overwrite)} | {*plain}
        for name in (*steps, *plain):
            if name in owners and name in own | replaced:
                raise ValueError(
                    f"{adapter.path}: {name}: {owners[name].path} changes it too, and one of the "
                    "two replaces it, so that the result would depend on their order"
                )
            owners[name] = adapter
        replaced |= own
        tensors |= plain
        for name, changes in steps.items():
            modules.setdefault(name, []).extend(changes)
    return _with_tie(base, modules, tensors)


def _check_head_is_certain(base: BaseWeights, modules: Mapping[str, Sequence[Change]]) -> None:
    """Refuse to change embeddings alone where a head of unknown name would change with them."""
    for name, steps in modules.items():
        keeps_tie = all(isinstance(step, Overwrite) and step.replacement.tied for step in steps)
        if not keeps_tie and may_be_tied_to(base.checkpoint, name):
            raise ValueError(
                f"{base.checkpoint.path}: {name}: an adapter changes it alone, and a head may be "
                "tied to it: none is stored, tie_word_embeddings is not false, and the name of the "
                "head does not follow from the names of the embeddings"
            )


def _check_factor(adapter: Adapter, weight: float) -> None:
    if adapter.replacements and weight != 1:
        raise ValueError(
            f"{adapter.path}: it replaces {next(iter(adapter.replacements))}, so that its weight "
            f"must be 1, got {weight}"
        )


def _with_tie(
    base: BaseWeights, modules: Mapping[str, Sequence[Change]], tensors: Mapping[str, Replacement]
) -> Changes:
    """Return changes that keep the head tied if they change it as the embeddings, or untie it."""
    vocabulary = base.vocabulary
    if vocabulary is None:
        _check_head_is_certain(base, modules)
    if vocabulary is None or not {vocabulary.embeddings, vocabulary.head} & {*modules}:
        return Changes(modules, tensors)
    of_embeddings, of_head = (
        [step.source for step in modules.get(name, ())]
        for name in (vocabulary.embeddings, vocabulary.head)
    )
    is_absent = not vocabulary.head_is_stored
    if of_embeddings == of_head:
        kept = {name: steps for name, steps in modules.items() if name != vocabulary.head}
        return Changes(kept if is_absent else modules, tensors)
    if is_absent and not base.is_tied:  # the model has no head
        return Changes(modules, tensors)
    if is_absent and vocabulary.embeddings in base.checkpoint.schemes:
        raise ValueError(
            f"{base.checkpoint.path}: {vocabulary.head} is tied to the embeddings, which are "
            f"quantised, and an adapter changes one of the two: a {vocabulary.head} of its own is "
            "not made of a quantised weight"
        )
    added = (vocabulary.head, vocabulary.embeddings) if is_absent else None
    ties = is_absent or True in ties_of(base.checkpoint.config)
    return Changes(modules, tensors, added, unties=ties)
