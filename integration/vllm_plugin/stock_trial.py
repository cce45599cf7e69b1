"""Whether vLLM's own kernel is faster for a kind of layer: measured at load, side by side.

The trial runs while the model is being built, before its weights are in memory, on random weights:
times depend on the shapes alone. The ratios are kept on disk.

Source: ``int4_lora.compiled.selection.timing``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean
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
from int4_lora.integration.vllm_plugin.stock_arithmetic import sixteen_bit_activations
from int4_lora.reference import PackedWeight

__all__ = ["Kind", "stock_reason"]

TOKENS = (1, 4, 8, 16, 24, 32, 64, 256)
MARGIN = 1.05  # vLLM's kernel is taken where ours takes longer by more, on geometric average
MOST_RATIO = 1.5  # or by more than this at one of TOKENS: no request may wait much longer
TRIES = 3  # until ours is within the margin: shared processors have slow moments
ROUNDS, BUDGET = 25, 0.7
MOST_COPIES = 6
MOST_SPREAD = 0.25  # of the rounds, in a measurement that is kept for later starts
FORMAT = 4  # to be raised when a change of the compiled path makes kept ratios wrong


@dataclass(frozen=True)
class Kind:
    """What the time of a layer's base depends on.

    Args:
        outputs: the out_features of each part that the layer is merged of.
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


def stock_reason(kind: Kind, device: torch.device) -> str | None:
    """Return why vLLM's kernel is to compute a kind of layer, or None where ours is to.

    Args:
        kind: the kind of layer.
        device: where it will run.
    """
    try:
        ratios = _ratios(kind, device)
    except Exception as error:  # Inductor raises whatever its compilers do
        return f"ours does not run: {type(error).__name__}: {error}".partition("\n")[0]
    average = geometric_mean(ratios.values())
    if average > MARGIN:
        return f"measured {average:.2f} x faster on average of {TOKENS[0]} to {TOKENS[-1]} tokens"
    tokens = max(ratios, key=lambda tokens: ratios[tokens])
    if ratios[tokens] > MOST_RATIO:
        return f"measured {ratios[tokens]:.2f} x faster at {tokens} tokens"
    return None


def _ratios(kind: Kind, device: torch.device) -> dict[str, float]:
    """Return our time over vLLM's at each number of tokens, kept from an earlier start or new."""
    key = {
        "format": FORMAT,
        "torch": torch.__version__,
        "vllm": installed_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "kind": {name: str(value) for name, value in vars(kind).items()},
    }
    kept = recall("stock", key)
    if isinstance(kept, dict) and set(kept) == set(map(str, TOKENS)):
        return {tokens: float(ratio) for tokens, ratio in kept.items()}
    ratios, steady = _measured(kind, device)
    if steady:
        remember("stock", key, ratios)
    return ratios


def _measured(kind: Kind, device: torch.device) -> tuple[dict[str, float], bool]:
    """Return our time over vLLM's at each number of tokens, and whether the machine was quiet.

    The best of the rounds are compared: other load on a machine only ever adds to a time.
    """
    # while vLLM builds a model, its device is torch's default; after loading, the CPU is
    with torch.device(device):
        return _measured_there(kind, device)


def _measured_there(kind: Kind, device: torch.device) -> tuple[dict[str, float], bool]:
    weights = [_random_weight(kind, device, seed) for seed in range(_copies(kind))]
    ours = [prepare(weight) for weight in weights]
    stock = [_stock_layer(kind, weight) for weight in weights]
    ratios, steady = {}, True
    for tokens in TOKENS:
        x = torch.randn(tokens, kind.inputs, device=device).to(kind.dtype)
        callables = {"ours": _call_ours(ours, x), "stock": _call_stock(stock, x)}
        tries: list[float] = []
        while len(tries) < TRIES and all(ratio > MARGIN for ratio in tries):
            with as_when_serving():
                times = measure(callables, rounds=ROUNDS, budget=BUDGET, seed=tokens)
            tries.append(min(times["ours"].seconds) / min(times["stock"].seconds))
            steady = steady and all(time.spread <= MOST_SPREAD for time in times.values())
        ratios[str(tokens)] = round(min(tries), 3)
    return ratios, steady


def _call_ours(weights: list[PreparedWeight], x: Tensor) -> Callable[[int], Tensor]:
    return lambda number: int4_linear(x, weights[number % len(weights)])


def _call_stock(
    layers: list[tuple[CompressedTensorsWNA16, Any]], x: Tensor
) -> Callable[[int], Tensor]:
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

    def random_words(*shape: int) -> Tensor:
        low, high = -(2**31), 2**31 - 1
        words = torch.randint(
            low, high, shape, generator=generator, dtype=torch.int64, device="cpu"
        )
        return words.to(device, torch.int32)

    scale = torch.full((rows, groups), 0.01, dtype=kind.scale_dtype, device=device)
    zero_point = None if kind.symmetric else random_words(-(-rows // 8), groups)
    packed = random_words(rows, -(-kind.inputs // 8))
    return PackedWeight(packed, scale, (rows, kind.inputs), zero_point)


def _stock_layer(kind: Kind, weight: PackedWeight) -> tuple[CompressedTensorsWNA16, Any]:
    """Return vLLM's own scheme, and a layer of it that holds a weight, for 16-bit activations."""
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
    with sixteen_bit_activations():
        scheme.process_weights_after_loading(layer)
    return scheme, layer
