"""Whether vLLM's own kernel is faster for a kind of layer: measured at load, side by side.

It is measured while the model is being built, when its weights are not in memory yet, on random
weights: the numbers do not matter, the shapes do. What was found is kept on disk.

Source: ``int4_lora.compiled.selection.timing``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)

from int4_lora.compiled import PreparedWeight, int4_linear, prepare
from int4_lora.compiled.selection.choice import device_name
from int4_lora.compiled.selection.timing import copies_beyond_the_cache, measure
from int4_lora.disk_cache import recall, remember
from int4_lora.integration.vllm_plugin.contract import installed_version
from int4_lora.integration.vllm_plugin.serving_state import as_when_serving
from int4_lora.reference import PackedWeight

__all__ = ["Kind", "stock_is_faster"]

TOKENS = (1, 4, 8, 16, 24, 32, 64, 256)
MARGIN = 1.05  # slower than this, at any number of tokens, and vLLM's kernel is taken
TRIES = 3  # for ours to be as fast: processors that are shared have slow moments
ROUNDS, BUDGET = 25, 0.7
MOST_COPIES = 6
MOST_SPREAD = 0.25  # of the rounds, in a measurement that is kept for later starts
FORMAT = 4  # counts up when the compiled path changes so that old measurements say nothing


@dataclass(frozen=True)
class Kind:
    """What the time of a layer's base depends on.

    Args:
        outputs: the outputs of each of the parts that it is merged of.
        inputs: its in_features, on this rank.
        all_inputs: its in_features on all ranks together.
        group_size: columns that share a scale, or -1 for whole rows.
        symmetric: whether there are no zero-points.
        dtype: of x, and of the scales that vLLM's kernel takes.
        scale_dtype: of the checkpoint's scales, which ours keeps.
    """

    outputs: tuple[int, ...]
    inputs: int
    all_inputs: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    scale_dtype: torch.dtype


_found: dict[Kind, str | None] = {}


def stock_is_faster(kind: Kind, device: torch.device) -> str | None:
    """Return how much faster vLLM's kernel is, in words, or None where it is not.

    Args:
        kind: the kind of layer.
        device: where it will run.
    """
    if kind not in _found:
        key = {
            "format": FORMAT,
            "torch": torch.__version__,
            "vllm": installed_version(),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "kind": {name: str(value) for name, value in vars(kind).items()},
        }
        ratios = recall("stock", key)
        if not isinstance(ratios, dict) or set(ratios) != set(map(str, TOKENS)):
            ratios, steady = _measured(kind, device)
            if steady:
                remember("stock", key, ratios)
        tokens = max(ratios, key=lambda one: float(ratios[one]))
        slower = float(ratios[tokens])
        _found[kind] = None if slower <= MARGIN else f"{slower:.2f} x faster at {tokens} tokens"
    return _found[kind]


def _measured(kind: Kind, device: torch.device) -> tuple[dict[str, float], bool]:
    """Return our time over theirs at each number of tokens, and whether the machine was quiet.

    The best of the rounds are compared: what else runs on a machine only ever adds to a time.
    """
    weights = [_random_weight(kind, device, seed) for seed in range(_copies(kind))]
    ours = [prepare(weight) for weight in weights]
    theirs = [_stock_layer(kind, weight) for weight in weights]
    ratios, steady = {}, True
    for tokens in TOKENS:
        x = torch.randn(tokens, kind.inputs, device=device).to(kind.dtype)
        callables = {"ours": _ours(ours, x), "theirs": _theirs(theirs, x)}
        found: list[float] = []
        while len(found) < TRIES and all(ratio > MARGIN for ratio in found):
            with as_when_serving():
                times = measure(callables, rounds=ROUNDS, budget=BUDGET, seed=tokens)
            found.append(min(times["ours"].seconds) / min(times["theirs"].seconds))
            steady = steady and all(one.spread <= MOST_SPREAD for one in times.values())
        ratios[str(tokens)] = round(min(found), 3)
    return ratios, steady


def _ours(weights: list[PreparedWeight], x: Tensor) -> Callable[[int], Tensor]:
    return lambda number: int4_linear(x, weights[number % len(weights)])


def _theirs(layers: list[tuple[CompressedTensorsWNA16, Any]], x: Tensor) -> Callable[[int], Tensor]:
    def call(number: int) -> Tensor:
        scheme, layer = layers[number % len(layers)]
        return scheme.apply_weights(layer, x, None)

    return call


def _copies(kind: Kind) -> int:
    packed = sum(kind.outputs) * kind.inputs // 2
    return min(MOST_COPIES, copies_beyond_the_cache(packed))


def _random_weight(kind: Kind, device: torch.device, seed: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    rows, groups = sum(kind.outputs), 1 if kind.group_size == -1 else kind.inputs // kind.group_size
    words = (rows, -(-kind.inputs // 8))

    def random_words(*shape: int) -> Tensor:
        low, high = -(2**31), 2**31 - 1
        drawn = torch.randint(low, high, shape, generator=generator, dtype=torch.int64)
        return drawn.to(device, torch.int32)

    scale = torch.full((rows, groups), 0.01, dtype=kind.scale_dtype, device=device)
    zeros = None if kind.symmetric else random_words(-(-rows // 8), groups)
    return PackedWeight(random_words(*words), scale, (rows, kind.inputs), zeros)


def _stock_layer(kind: Kind, weight: PackedWeight) -> tuple[CompressedTensorsWNA16, Any]:
    """Return vLLM's own scheme and a layer that it holds a weight in."""
    whole_rows = kind.group_size == -1
    scheme = CompressedTensorsWNA16(
        strategy="channel" if whole_rows else "group",
        num_bits=4,
        group_size=None if whole_rows else kind.group_size,
        symmetric=kind.symmetric,
    )
    layer: Any = torch.nn.Module()
    layer.bias = None
    scheme.create_weights(
        layer=layer,
        output_size=sum(kind.outputs),
        input_size=kind.all_inputs,
        output_partition_sizes=list(kind.outputs),
        input_size_per_partition=kind.inputs,
        params_dtype=kind.dtype,
        weight_loader=lambda *_: None,
    )
    layer.weight_packed.data.copy_(weight.packed)
    layer.weight_scale.data.copy_(weight.scale)
    if weight.zero_point is not None:
        layer.weight_zero_point.data.copy_(weight.zero_point)
    scheme.process_weights_after_loading(layer)
    return scheme, layer
