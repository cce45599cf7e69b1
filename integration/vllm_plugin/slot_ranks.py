"""The slots of a layer's adapters at several ranks: a batch pays for the ranks of its adapters.

vLLM pads every slot to ``max_lora_rank`` with zeros, and a compiled function sums over the rank of
the tensors that it is given. A view of the first ranks of all slots gives the same sums at the cost
of these ranks, as long as no adapter of the batch has a larger rank. Each rank is another graph, so
that ranks are rounded up to a power of two.

On a GPU whole slots are read: to know the adapters of a batch would mean to wait for the device,
and a captured graph would go on reading the view that it was captured with.

Source: vLLM's ``BaseLinearLayerWithLoRA.create_lora_weights`` for the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor

from int4_lora.compiled import PreparedExpertsLoRA, PreparedLoRA
from int4_lora.compiled.adapters.prepared import PreparedSlice

__all__ = ["SlotRanks", "at_rank", "narrower_ranks", "slices_of"]

LEAST_RANK = 16  # each rank is another graph for each kind of layer, which each start compiles
Slots = TypeVar("Slots", bound=PreparedLoRA | PreparedExpertsLoRA)


def narrower_ranks(rank: int) -> list[int]:
    """Return the ranks below that of whole slots at which the slots are read, ascending.

    Example:
        >>> narrower_ranks(64), narrower_ranks(16)
        ([16, 32], [])
    """
    ranks, narrower = LEAST_RANK, []
    while ranks < rank:
        narrower.append(ranks)
        ranks *= 2
    return narrower


def at_rank(lora: PreparedLoRA, rank: int) -> PreparedLoRA:
    """Return a view of the first ``rank`` ranks of every slot.

    Args:
        lora: whole slots.
        rank: at most that of the slots.
    """
    return PreparedLoRA(
        tuple(
            PreparedSlice(part.a[:, :rank], part.bt[:, :rank], part.scaling, part.start)
            for part in lora.slices
        )
    )


def slices_of(slots: PreparedLoRA | PreparedExpertsLoRA) -> Sequence[PreparedSlice]:
    """Return the slices of a linear layer's slots, or those of ``gate_up`` and ``down``."""
    if isinstance(slots, PreparedLoRA):
        return slots.slices
    layers = (slots.gate_up, slots.down)
    return [part for layer in layers if layer is not None for part in layer.slices]


class SlotRanks(Generic[Slots]):
    """The rank of the adapter in each slot, and the slots at the ranks that batches need.

    Args:
        whole: the slots of a linear layer or of a layer's experts, at their whole rank.
        narrower: views of them at smaller ranks, ascending.
    """

    def __init__(self, whole: Slots, narrower: Sequence[Slots] = ()) -> None:
        self.at_ranks: tuple[Slots, ...] = (*narrower, whole)
        self._ranks: dict[int, int] = {}

    def rank(self, slot: int) -> int:
        """Return the rank of the adapter in a slot; 0 where it changes nothing."""
        return self._ranks.get(slot, 0)

    def note(self, slot: int, rank: int) -> None:
        """Note the rank of the adapter in a slot, which is zero beyond it; 0 for none."""
        self._ranks[slot] = rank

    def note_unknown(self, slot: int) -> None:
        """Note that a slot may hold anything, at its whole rank."""
        self.note(slot, slices_of(self.at_ranks[-1])[0].rank)

    def note_finite(self, slot: int, finite: bool) -> None:
        """Note whether the B of a slot, of all its experts, holds neither NaN nor infinity."""
        for lora in self.at_ranks:
            experts = lora.experts if isinstance(lora, PreparedExpertsLoRA) else 1
            for part in slices_of(lora):
                part.note_finite(slot * experts, finite)

    def of_batch(self, adapter_ids: Tensor) -> Slots | None:
        """Return the slots at the smallest rank that holds all adapters of a batch.

        Args:
            adapter_ids: int ``[tokens]`` on the CPU, an id that is no slot for no adapter.

        Returns:
            The slots, or None if no token has an adapter that changes the layer.
        """
        rank = max(map(self.rank, set(adapter_ids.tolist())), default=0)
        if rank == 0:
            return None
        return next(lora for lora in self.at_ranks if slices_of(lora)[0].rank >= rank)
