"""The contenders: our layer, its formulations, the dense layer and the eager reference.

Other projects' kernels are in ``benchmarks/peers``.

Source: ``benchmarks/results/README.md``.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from benchmarks.weights import FORMATS
from int4_lora import reference
from int4_lora.compiled import formulation_for, int4_linear, int4_lora_linear, layouts, prepare_lora
from int4_lora.compiled.graphs.entry import plan
from int4_lora.compiled.selection.choice import candidates

LOOSEST = {"weight_rounded": False, "base_rounded": True}  # gives the largest bound of integers


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    Args:
        name: the name in tables.
        kind: "ours", "formulation", "dense", "reference", or "peer" for another INT4 layer.
        layer: the function that computes y from one copy of the weight.
        weights: copies of the weight in the form that ``layer`` takes, which are used in turn.
        lora: whether the layer adds the adapters.
        roundings: the layer's roundings, as keyword arguments of ``check_linear``.
    """

    name: str
    kind: str
    layer: Callable[[Any], Tensor]
    weights: list[Any]
    lora: bool = False
    roundings: dict[str, bool] = field(default_factory=lambda: LOOSEST)


def our_layers(operands):
    """Return our layer with and without adapters, and the dense layer.

    Each copy of our weight has a separate copy of the adapters, as in a model. Peers share one copy
    of the adapters, which stays in the cache.
    """
    x, ids = operands.x, operands.ids
    ours = operands.in_layout(operands.first_layout)
    pairs = [(weight, prepare_lora(operands.stack)) for weight in [*ours[1:], ours[0]]]
    with_lora = functools.partial(_with_lora, x, ids)
    base, layer = (
        formulation_for(ours[0], operands.dtype, operands.tokens, lora)
        for lora in (None, pairs[0][1])
    )
    return [
        Contender(
            "ours",
            "ours",
            lambda weight: int4_linear(x, weight),
            ours,
            roundings=_roundings(operands, base.weight_rounded),
        ),
        Contender(
            "ours + LoRA",
            "ours",
            with_lora,
            pairs,
            lora=True,
            roundings=_roundings(operands, layer.weight_rounded),
        ),
        Contender(
            "dense",
            "dense",
            lambda weight: linear(x, weight),
            operands.dense_copies(),
            roundings=_roundings(operands, True),
        ),
    ]


def formulations(operands):
    """Return every formulation that takes the operands, without adapters."""
    contenders = {}
    possible = layouts(operands.weight)
    for layout in [name for name in possible if name in ("interleaved", possible[0])]:
        weights = operands.in_layout(layout)
        for formulation in candidates(weights[0], operands.dtype, operands.tokens):
            contender = of_formulation(formulation, operands, weights)
            contenders.setdefault(contender.name, contender)
    return list(contenders.values())


def of_formulation(formulation, operands, weights):
    """Return a formulation as a contender, without adapters.

    Args:
        formulation: a formulation.
        operands: the Layer.
        weights: copies of the weight in a layout that it reads.
    """
    layer = functools.partial(_formulation, formulation, operands.x)
    roundings = _roundings(operands, formulation.weight_rounded)
    name = f"formulation {formulation.name}"
    return Contender(name, "formulation", layer, weights, roundings=roundings)


def eager_reference(operands):
    """Return the eager reference with and without adapters."""
    x, stack, ids = operands.x, operands.stack, operands.ids
    with_lora = functools.partial(_reference_with_lora, x, stack, ids)
    return [
        Contender(
            "reference",
            "reference",
            lambda weight: reference.int4_linear(x, weight),
            [operands.weight],
        ),
        Contender("reference + LoRA", "reference", with_lora, [operands.weight], lora=True),
    ]


def rotated(contenders):
    """Rotate the contenders' copies, so that contenders that share copies use different copies."""
    sharers = Counter()
    turned = []
    for contender in contenders:
        weights = contender.weights
        start = sharers[id(weights)] % len(weights)
        sharers[id(weights)] += 1
        turned.append(dataclasses.replace(contender, weights=weights[start:] + weights[:start]))
    return turned


def _roundings(operands, weight_rounded):
    """Return the roundings to judge by: no bound of FP4 covers rounded weights and exact ones."""
    if not FORMATS[operands.format].is_float:
        return LOOSEST
    return {"weight_rounded": weight_rounded, "base_rounded": True}


def _with_lora(x, ids, weight_and_lora):
    weight, lora = weight_and_lora
    return int4_lora_linear(x, weight, lora, ids)


def _reference_with_lora(x, stack, ids, weight):
    return reference.int4_lora_linear(x, weight, stack, ids)


def _formulation(formulation, x, weight):
    return plan(x, weight, formulation=formulation)(x, None)
