"""Who is measured: our layer, its formulations, the dense layer and the eager reference.

What others wrote is in ``benchmarks/peers``.

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

from int4_lora import reference
from int4_lora.compiled import int4_linear, int4_lora_linear, layouts, prepare_lora
from int4_lora.compiled.graphs.entry import plan
from int4_lora.compiled.selection.choice import candidates

LOOSEST = {"weight_rounded": False, "base_rounded": True}  # a bound that holds for either


@dataclass(frozen=True)
class Contender:
    """One way to compute a layer.

    Args:
        name: what tables call it.
        kind: "ours", "formulation", "dense", "reference", or "peer" for another INT4 layer.
        layer: computes y from one copy of the weight.
        weights: copies of the weight as ``layer`` takes it, to be cycled through.
        lora: whether the adapters are added.
        roundings: those that it makes, by the names of ``check_linear``.
    """

    name: str
    kind: str
    layer: Callable[[Any], Tensor]
    weights: list[Any]
    lora: bool = False
    roundings: dict[str, bool] = field(default_factory=lambda: LOOSEST)


def own(operands):
    """Return our layer with and without adapters, and the dense layer.

    Every copy of our weight has its own copy of the adapters, as layers have; peers are given one
    for all, which stays in the cache.
    """
    x, ids = operands.x, operands.ids
    ours = operands.in_layout(layouts(operands.weight)[0])
    pairs = [(weight, prepare_lora(operands.stack)) for weight in [*ours[1:], ours[0]]]
    with_lora = functools.partial(_with_lora, x, ids)
    return [
        Contender("ours", "ours", lambda weight: int4_linear(x, weight), ours),
        Contender("ours + LoRA", "ours", with_lora, pairs, lora=True),
        Contender("dense", "dense", lambda weight: linear(x, weight), operands.dense_copies()),
    ]


def formulations(operands):
    """Return every formulation that takes the operands, without adapters."""
    found = {}
    held = layouts(operands.weight)
    for layout in [name for name in held if name in ("interleaved", held[0])]:
        weights = operands.in_layout(layout)
        for one in candidates(weights[0], operands.dtype, operands.tokens):
            name = f"formulation {one.name}"
            layer = functools.partial(_formulation, one, operands.x)
            found.setdefault(name, Contender(name, "formulation", layer, weights))
    return list(found.values())


def eager_reference(operands):
    """Return the reference, eager, with and without adapters; dequantising is most of its time."""
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
    """Return the contenders so that those who share copies take different ones in a round."""
    sharers = Counter()
    turned = []
    for one in contenders:
        start = sharers[id(one.weights)] % len(one.weights)
        sharers[id(one.weights)] += 1
        turned.append(dataclasses.replace(one, weights=one.weights[start:] + one.weights[:start]))
    return turned


def _with_lora(x, ids, weight_and_lora):
    weight, lora = weight_and_lora
    return int4_lora_linear(x, weight, lora, ids)


def _reference_with_lora(x, stack, ids, weight):
    return reference.int4_lora_linear(x, weight, stack, ids)


def _formulation(formulation, x, weight):
    return plan(x, weight, formulation=formulation)(x, None)
