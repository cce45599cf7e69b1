"""Experts as the compiled path reads them: each weight in its layout, all pairs of adapters in one.

The adapters of E experts are laid out as A x E pairs, adapters first: the pair of adapter a and
expert e is the pair a * E + e. So a token is given its pair by one id, as in any layer.

Source: ``int4_lora.reference.experts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from int4_lora.compiled.adapters.prepared import PreparedLoRA
from int4_lora.compiled.layouts.layout import PreparedWeight
from int4_lora.compiled.preparation import prepare, prepare_lora
from int4_lora.reference import ExpertsLoRA, ExpertsWeight, LoRASlice, LoRAStack, PackedWeight

__all__ = ["PreparedExperts", "PreparedExpertsLoRA", "prepare_experts", "prepare_experts_lora"]


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """The weights of all experts, in the layouts that ``prepare`` chose.

    Args:
        gate_up: the weight of each expert, ``[2 * inter, hidden]``.
        down: the weight of each expert, ``[hidden, inter]``.
    """

    gate_up: tuple[PreparedWeight, ...]
    down: tuple[PreparedWeight, ...]

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
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.gate_up[0].device

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(weight.nbytes for weight in (*self.gate_up, *self.down))

    @cached_property
    def alike(self) -> bool:
        """Whether all experts have the same layouts, shapes and dtypes."""
        return all(
            weight.signature == layer[0].signature
            for layer in (self.gate_up, self.down)
            for weight in layer
        )

    def experts_weight(self) -> ExpertsWeight:
        """Return the checkpoint's tensors, bit for bit."""
        return ExpertsWeight(_packed_weights(self.gate_up), _packed_weights(self.down))


@dataclass(frozen=True, eq=False)
class PreparedExpertsLoRA:
    """The adapters of all experts.

    Args:
        gate_up: adapters x experts pairs, adapters first; None where there are none.
        down: the same.
        adapters: the number of adapters.
        experts: the number of experts.
    """

    gate_up: PreparedLoRA | None
    down: PreparedLoRA | None
    adapters: int
    experts: int

    def experts_lora(self) -> ExpertsLoRA:
        """Return the adapters as the reference reads them; their tensors are views."""
        return ExpertsLoRA(self._by_expert(self.gate_up), self._by_expert(self.down))

    def _by_expert(self, layer: PreparedLoRA | None) -> list[list[LoRASlice]] | None:
        if layer is None:
            return None
        slices = [part.lora_slice() for part in layer.slices]
        return [
            [
                LoRASlice(
                    LoRAStack(*(t[expert :: self.experts] for t in _tensors(part.stack))),
                    part.start,
                )
                for part in slices
            ]
            for expert in range(self.experts)
        ]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(layer.nbytes for layer in (self.gate_up, self.down) if layer is not None)


def prepare_experts(experts: ExpertsWeight, *, layout: str | None = None) -> PreparedExperts:
    """Lay out the weights of experts for the formulations of their device.

    Args:
        experts: the checkpoint's tensors, on the device that will compute.
        layout: a name from ``layouts(weight)``; None for the first that can hold each weight.

    Returns:
        The prepared experts; ``experts_weight()`` returns the checkpoint's tensors.

    Raises:
        TypeError: ``experts`` is not an ExpertsWeight.
        ValueError: there is no such layout, or it cannot hold a weight.

    Example:
        >>> from int4_lora.reference import quantize
        >>> gate_up, down = (quantize(torch.ones(shape)) for shape in ((256, 128), (128, 128)))
        >>> prepare_experts(ExpertsWeight([gate_up] * 2, [down] * 2)).count
        2

    Source:
        ``prepare``, for each weight.
    """
    if not isinstance(experts, ExpertsWeight):
        raise TypeError(f"experts must be an ExpertsWeight, got {type(experts).__name__}")
    return PreparedExperts(
        tuple(prepare(weight, layout=layout) for weight in experts.gate_up),
        tuple(prepare(weight, layout=layout) for weight in experts.down),
    )


def prepare_experts_lora(lora: ExpertsLoRA) -> PreparedExpertsLoRA:
    """Copy the adapters of experts into the layout of the compiled path.

    Experts without adapters get pairs of zeros, and smaller ranks are padded with zeros. Where some
    experts have slices, the adapters of all are cut at the ends of these slices. Gradients flow
    back through the copy.

    Args:
        lora: the adapters of all experts.

    Returns:
        The prepared adapters.

    Raises:
        TypeError: ``lora`` is not an ExpertsLoRA, or its experts' adapters differ in dtype.
        ValueError: there are no adapters.

    Example:
        >>> stack = LoRAStack.stack([(torch.ones(2, 8), torch.ones(4, 2), 1.0)])
        >>> lora = prepare_experts_lora(ExpertsLoRA(gate_up=[stack, None, stack]))
        >>> lora.gate_up.slices[0].a.shape
        torch.Size([3, 2, 8])

    Source:
        ``prepare_lora``.
    """
    if not isinstance(lora, ExpertsLoRA):
        raise TypeError(f"lora must be an ExpertsLoRA, got {type(lora).__name__}")
    if not lora.adapters:
        raise ValueError("lora must hold adapters for at least one expert, got none")
    return PreparedExpertsLoRA(
        gate_up=_prepared("gate_up", lora),
        down=_prepared("down", lora),
        adapters=lora.adapters,
        experts=lora.count,
    )


def _packed_weights(weights: Sequence[PreparedWeight]) -> list[PackedWeight]:
    """Return the checkpoint's tensors of experts, which are integers."""
    packed = [weight.packed_weight() for weight in weights]
    return [weight for weight in packed if isinstance(weight, PackedWeight)]


def _prepared(name: str, lora: ExpertsLoRA) -> PreparedLoRA | None:
    """Lay out the adapters of a layer of all experts, or return None where there are none."""
    if getattr(lora, name) is None:
        return None
    by_expert = [lora.slices(name, expert) for expert in range(lora.count)]
    cuts = sorted({end for slices in by_expert for part in slices for end in _ends(part)})
    parts = []
    for start, stop in pairwise(cuts):
        stacks = [_cut(slices, start, stop) for slices in by_expert]
        if any(stack is not None for stack in stacks):
            parts.append(LoRASlice(_all_pairs(name, stacks), start))
    return prepare_lora(parts) if parts else None


def _ends(part: LoRASlice) -> tuple[int, int]:
    return part.start, part.stop


def _cut(slices: Sequence[LoRASlice], start: int, stop: int) -> LoRAStack | None:
    """Return the adapters of outputs that one slice writes, or None where none does."""
    for part in slices:
        if part.start <= start and stop <= part.stop:
            stack = part.stack
            return LoRAStack(
                stack.a, stack.b[:, start - part.start : stop - part.start], stack.scaling
            )
    return None


def _all_pairs(name: str, stacks: Sequence[LoRAStack | None]) -> LoRAStack:
    """Return adapters x experts pairs, adapters first."""
    given = [stack for stack in stacks if stack is not None]
    first, rank = given[0], max(stack.rank for stack in given)
    for expert, stack in enumerate(stacks):
        if stack is not None and stack.a.dtype != first.a.dtype:
            raise TypeError(
                f"adapters of all experts must have one dtype: lora.{name}[{expert}] has "
                f"{stack.a.dtype}, others have {first.a.dtype}"
            )
    zeros = LoRAStack(*(torch.zeros_like(t) for t in (first.a, first.b, first.scaling)))
    padded = [_padded(zeros if stack is None else stack, rank) for stack in stacks]
    a, b, scaling = (
        torch.stack(tensors, dim=1).flatten(0, 1) for tensors in zip(*padded, strict=True)
    )
    return LoRAStack(a, b, scaling)


def _tensors(stack: LoRAStack) -> tuple[Tensor, Tensor, Tensor]:
    return stack.a, stack.b, stack.scaling


def _padded(stack: LoRAStack, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a, b and scaling with zeros up to a rank."""
    missing = rank - stack.rank
    return pad(stack.a, (0, 0, 0, missing)), pad(stack.b, (0, missing)), stack.scaling.double()
