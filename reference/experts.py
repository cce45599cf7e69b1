"""The expert layers of one mixture of experts: their INT4 weights, and their adapters.

Each expert is a gated feed-forward network of two INT4 layers: ``gate_up``, whose first half of
outputs is the gate and whose second half is up, and ``down``.

Source: ``Qwen3MoeExperts`` of transformers, whose ``gate_up_proj`` has this order; vLLM's w13, w2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from int4_lora.reference.checks import as_device, check_one_device
from int4_lora.reference.linear import as_slices, check_slices
from int4_lora.reference.lora_stack import LoRASlice, LoRAStack
from int4_lora.reference.packed_weight import PackedWeight

__all__ = ["ExpertLoRA", "ExpertsLoRA", "ExpertsWeight"]

ExpertLoRA = LoRAStack | Sequence[LoRASlice] | None
"""The adapters of one layer of one expert; None where no adapter changes it."""


@dataclass(frozen=True, eq=False)
class ExpertsWeight:
    """The INT4 weights of all experts of one layer, checked on creation.

    Args:
        gate_up: one weight ``[2 * inter, hidden]`` for each expert; the gate has the first rows.
        down: one weight ``[hidden, inter]`` for each expert.

    Raises:
        TypeError: not a sequence, or an entry that is no PackedWeight, such as the None of an
            expert that a checkpoint lacks; the message names the entry.
        ValueError: no experts, an expert that gate_up or down lacks, experts whose formats or
            devices differ, or widths that do not fit.

    Example:
        >>> from int4_lora.reference import quantize
        >>> experts = ExpertsWeight(
        ...     gate_up=[quantize(torch.ones(4, 8), group_size=8) for _ in range(3)],
        ...     down=[quantize(torch.ones(8, 2), group_size=2) for _ in range(3)],
        ... )
        >>> experts.count, experts.hidden, experts.inter
        (3, 8, 2)

    Source:
        ``docs/numerics.md``, "Experts".
    """

    gate_up: Sequence[PackedWeight]
    down: Sequence[PackedWeight]

    def __post_init__(self) -> None:
        for name in ("gate_up", "down"):
            object.__setattr__(self, name, _checked_weights(name, getattr(self, name)))
        if len(self.gate_up) != len(self.down):
            raise ValueError(
                "gate_up and down must hold a weight for each expert, "
                f"got {len(self.gate_up)} and {len(self.down)}"
            )
        rows, hidden = self.gate_up[0].shape
        if rows % 2 or self.down[0].shape != (hidden, rows // 2):
            raise ValueError(
                "gate_up must be [2 * inter, hidden] and down [hidden, inter], "
                f"got {[rows, hidden]} and {[*self.down[0].shape]}"
            )
        check_one_device(gate_up=self.gate_up[0].packed, down=self.down[0].packed)

    @property
    def count(self) -> int:
        """The number of experts."""
        return len(self.gate_up)

    @property
    def hidden(self) -> int:
        """The width of x and of y."""
        return self.gate_up[0].in_features

    @property
    def inter(self) -> int:
        """The width between gate_up and down."""
        return self.down[0].in_features

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(weight.nbytes for weight in (*self.gate_up, *self.down))

    def to(self, device: torch.device | str) -> ExpertsWeight:
        """Return the same experts with every tensor on ``device``."""
        device = as_device(device)
        return ExpertsWeight(
            [weight.to(device) for weight in self.gate_up],
            [weight.to(device) for weight in self.down],
        )


@dataclass(frozen=True, eq=False)
class ExpertsLoRA:
    """The adapters of all experts of one layer; an id means the same adapter in every expert.

    Args:
        gate_up: for each expert a LoRAStack with the outputs of ``gate_up``, or LoRASlices, in
            which gate starts at 0 and up at inter, or None where no adapter changes the expert.
            None if no adapter changes any. Experts may share tensors.
        down: the same for ``down``.

    Raises:
        TypeError: an entry of the wrong type; the message names it.
        ValueError: entries with different numbers of adapters, or for different numbers of experts.

    Example:
        >>> a, b = torch.ones(1, 1, 8), torch.ones(1, 4, 1)
        >>> shared_a = [LoRAStack(a, b * expert, torch.ones(1)) for expert in range(3)]
        >>> lora = ExpertsLoRA(gate_up=shared_a, down=None)
        >>> lora.adapters, lora.count
        (1, 3)

    Source:
        PEFT's pairs of each expert; ``docs/numerics.md``, "Experts".
    """

    gate_up: Sequence[ExpertLoRA] | None = None
    down: Sequence[ExpertLoRA] | None = None

    def __post_init__(self) -> None:
        first: tuple[str, int] | None = None
        for name in ("gate_up", "down"):
            entries = getattr(self, name)
            if entries is None:
                continue
            if not isinstance(entries, (list, tuple)):
                raise TypeError(
                    f"{name} must be a sequence with the adapters of each expert, or None, "
                    f"got {type(entries).__name__}"
                )
            object.__setattr__(self, name, tuple(entries))
            for expert, entry in enumerate(entries):
                adapters = _adapters_of(f"{name}[{expert}]", entry)
                if adapters and first is None:
                    first = (f"{name}[{expert}]", adapters)
                if adapters and first is not None and adapters != first[1]:
                    raise ValueError(
                        f"all experts must have the same adapters: {first[0]} has {first[1]}, "
                        f"{name}[{expert}] has {adapters}"
                    )
        gate_up, down = self.gate_up, self.down
        if gate_up is not None and down is not None and len(gate_up) != len(down):
            raise ValueError(
                f"gate_up and down must be for the same experts, got {len(gate_up)} and {len(down)}"
            )

    @property
    def adapters(self) -> int:
        """The number of adapters; 0 where no expert has any."""
        for entry in (*(self.gate_up or ()), *(self.down or ())):
            for part in as_slices(entry):
                return part.stack.adapters
        return 0

    @property
    def count(self) -> int:
        """The number of experts; 0 where neither gate_up nor down is given."""
        return len(self.gate_up or self.down or ())

    def slices(self, name: str, expert: int) -> tuple[LoRASlice, ...]:
        """Return the adapters of a layer of an expert as slices; empty where there are none.

        Args:
            name: "gate_up" or "down".
            expert: the expert's index.
        """
        entries: Sequence[ExpertLoRA] | None = getattr(self, name)
        return () if entries is None else as_slices(entries[expert])

    def check_fits(self, experts: ExpertsWeight) -> None:
        """Check that these adapters fit ``experts``.

        Raises:
            ValueError: another number of experts, or adapters that do not fit a layer; the message
                names the layer and the expert.
        """
        for name in ("gate_up", "down"):
            entries: Sequence[ExpertLoRA] | None = getattr(self, name)
            if entries is None:
                continue
            if len(entries) != experts.count:
                raise ValueError(
                    f"lora.{name} must have an entry for each of the {experts.count} experts, "
                    f"got {len(entries)}"
                )
            for expert, entry in enumerate(entries):
                try:
                    check_slices(getattr(experts, name)[expert], entry)
                except ValueError as error:
                    raise ValueError(f"lora.{name}[{expert}]: {error}") from None

    def to(self, device: torch.device | str) -> ExpertsLoRA:
        """Return the same adapters with every tensor on ``device``."""
        device = as_device(device)

        def moved(entry: ExpertLoRA) -> ExpertLoRA:
            if entry is None or isinstance(entry, LoRAStack):
                return None if entry is None else entry.to(device)
            return [LoRASlice(part.stack.to(device), part.start) for part in entry]

        given = (self.gate_up, self.down)
        return ExpertsLoRA(*(None if each is None else [moved(e) for e in each] for each in given))


def _checked_weights(name: str, weights: object) -> tuple[PackedWeight, ...]:
    """Check that the weights of all experts have one format; return them as a tuple."""
    if not isinstance(weights, (list, tuple)):
        got = type(weights).__name__
        raise TypeError(f"{name} must be a sequence of PackedWeight, got {got}")
    if not weights:
        raise ValueError(f"{name} must hold at least one expert, got none")
    for expert, weight in enumerate(weights):
        if not isinstance(weight, PackedWeight):
            got = type(weight).__name__
            raise TypeError(f"{name}[{expert}] must be a PackedWeight, got {got}")
        for what, value in _format(weight).items():
            expected = _format(weights[0])[what]
            if value != expected:
                raise ValueError(
                    f"all experts must have one format: {what} of {name}[0] is {expected}, "
                    f"of {name}[{expert}] {value}"
                )
    return tuple(weights)


def _format(weight: PackedWeight) -> dict[str, object]:
    """Return what must be equal in all experts, by its name in messages."""
    return {
        "shape": [*weight.shape],
        "bits": weight.bits,
        "dtype of scale": str(weight.scale.dtype).removeprefix("torch."),
        "shape of scale": [*weight.scale.shape],
        "whether zero_point is given": weight.zero_point is not None,
        "whether g_idx is given": weight.g_idx is not None,
        "device": str(weight.packed.device),
    }


def _adapters_of(name: str, entry: ExpertLoRA) -> int:
    """Return how many adapters an expert has, 0 for None."""
    try:
        slices = as_slices(entry)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return slices[0].stack.adapters if slices else 0
