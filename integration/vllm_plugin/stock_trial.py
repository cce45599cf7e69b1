"""The times of vLLM's code and of ours for a kind of layer: measured at load, side by side.

The trial runs while the model is being built, before its weights are in memory, on random weights:
times depend on the shapes alone. They are kept on disk.

Source: ``int4_lora.compiled.selection.timing``.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsWNA16,
)

from int4_lora.compiled import PreparedLoRA, PreparedWeight, add_lora, int4_linear, prepare
from int4_lora.compiled.linear import BoundLayer
from int4_lora.compiled.selection.choice import device_name
from int4_lora.compiled.selection.timing import copies_beyond_the_cache, measure
from int4_lora.disk_cache import recall, remember
from int4_lora.integration.vllm_plugin.base_choice import (
    ADAPTERS,
    BASES,
    LAYER,
    MARGIN,
    SHARED_BASE,
    STOCK_ADAPTERS,
    VLLM,
    Choice,
    Plan,
    choose,
)
from int4_lora.integration.vllm_plugin.contract import installed_version
from int4_lora.integration.vllm_plugin.served_engine import logger
from int4_lora.integration.vllm_plugin.served_layer import adapter_slots
from int4_lora.integration.vllm_plugin.serving_state import as_when_serving
from int4_lora.integration.vllm_plugin.stock_arithmetic import sixteen_bit_activations
from int4_lora.integration.vllm_plugin.stock_layout import shared_weight
from int4_lora.integration.vllm_plugin.vocabulary import adds_to_rows_without_an_adapter
from int4_lora.reference import PackedWeight

__all__ = ["Kind", "choice_of"]

TRIES = 3  # until it is quiet and ours within the margin: shared processors have slow moments
ROUNDS, BUDGET = 25, 0.7
MOST_COPIES = 6
MOST_SPREAD = 0.25  # of the rounds, in a measurement that is kept for later starts
FORMAT = 7  # to be raised when a change of the compiled path makes kept times wrong
Operand = TypeVar("Operand")


@dataclass(frozen=True)
class Kind:
    """What the times of a layer depend on.

    Args:
        outputs: the out_features of each part that the layer is merged of.
        inputs: its in_features, on this rank.
        all_inputs: its in_features on all ranks together.
        group_size: columns that share a scale, or -1 for whole rows.
        symmetric: whether there are no zero-points.
        dtype: of x, of the adapters, and of the scales that vLLM's kernel takes.
        scale_dtype: of the checkpoint's scales, which ours keeps.
        slots: how many adapters the engine serves at a time, 0 for none.
        rank: the rank that adapters are padded to.
    """

    outputs: tuple[int, ...]
    inputs: int
    all_inputs: int
    group_size: int
    symmetric: bool
    dtype: torch.dtype
    scale_dtype: torch.dtype
    slots: int = 0
    rank: int = 0


def choice_of(
    kind: Kind, device: torch.device, favour: str = "balanced", *, may_share: bool = True
) -> Choice:
    """Return whose code is to compute the base and the adapters of a kind of layer.

    Args:
        kind: the kind of layer.
        device: where it will run.
        favour: the operator's option.
        may_share: whether a layer may run vLLM's kernel and ours on one copy of the weight.
    """
    times = _KeptTimes(kind, device, may_share)
    wrong = device.type == "cpu" and adds_to_rows_without_an_adapter()
    stock_adapters = kind.slots > 0 and not wrong
    try:
        choice = choose(times, favour, slots=kind.slots, stock_adapters=stock_adapters)
    except Exception as error:  # Inductor raises whatever its compilers do
        reason = f"ours does not run: {type(error).__name__}: {error}".partition("\n")[0]
        return Choice(Plan(VLLM), reason, reason)
    times.keep()
    return choice


class _KeptTimes:
    """The times of a kind of layer, from an earlier start or measured when they are asked for."""

    def __init__(self, kind: Kind, device: torch.device, may_share: bool) -> None:
        self._kind, self._device, self._may_share = kind, device, may_share
        self._key = {
            "format": FORMAT,
            "torch": torch.__version__,
            "vllm": installed_version(),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "kind": {name: str(value) for name, value in vars(kind).items()},
        }
        self._table = _checked(recall("stock", self._key))
        self._new: list[tuple[str, str, bool]] = []  # tokens, name, whether the machine was quiet

    def __call__(self, names: Sequence[str], tokens: int) -> dict[str, float]:
        """Return the seconds of each name that can run, at a number of tokens."""
        row = self._table.setdefault(str(tokens), {})
        wanted = [name for name in names if name != SHARED_BASE or self._may_share]
        missing = [name for name in wanted if name not in row]
        if missing:
            # while vLLM builds a model, its device is torch's default; after loading, the CPU is
            with torch.device(self._device):
                seconds, steady = self._trial.seconds(missing, tokens)
            row.update({name: seconds.get(name) for name in missing})
            self._new += [(str(tokens), name, steady) for name in missing]
        return {name: time for name in wanted if (time := row[name]) is not None}

    def keep(self) -> None:
        """Keep for later starts what was measured while the machine was quiet."""
        for tokens, name, steady in self._new:
            if not steady:
                del self._table[tokens][name]
        if any(steady for _, _, steady in self._new):
            remember("stock", self._key, self._table)
        self._new = []

    @cached_property
    def _trial(self) -> _Trial:
        return _Trial(self._kind, self._device)


class _Trial:
    """Layers of a kind on random weights, of which there are more than fit into the cache."""

    def __init__(self, kind: Kind, device: torch.device) -> None:
        self._kind, self._device = kind, device
        self._weights = [_random_weight(kind, device, seed) for seed in range(_copies(kind))]

    def seconds(self, names: Sequence[str], tokens: int) -> tuple[dict[str, float], bool]:
        """Return the seconds of each name that can run, and whether the machine was quiet.

        The best of the rounds are taken: other load on a machine only ever adds to a time. While
        the machine is not quiet, or ours is slower, it is tried again.
        """
        x = self._random(tokens, self._kind.inputs)
        made = {name: self._callable(name, x) for name in names}
        callables = {name: call for name, call in made.items() if call is not None}
        best: dict[str, float] = {}
        steady, tries = False, 0
        while callables and tries < TRIES and (not steady or _ours_is_slower(best)):
            with as_when_serving():
                times = measure(callables, rounds=ROUNDS, budget=BUDGET, seed=tokens)
            for name, measured in times.items():
                best[name] = min(best.get(name, torch.inf), *measured.seconds)
            steady = all(measured.spread <= MOST_SPREAD for measured in times.values())
            tries += 1
        return best, steady or not callables

    def _callable(self, name: str, x: Tensor) -> Callable[[int], object] | None:
        """Return a call of one of the layers by its number, or None for what cannot run."""
        if name == BASES[0]:
            return _in_turn(self._ours, lambda weight: int4_linear(x, weight))
        if name == BASES[1]:
            return _in_turn(self._stock, lambda stock: stock[0].apply_weights(stock[1], x, None))
        if name == SHARED_BASE:
            shared = self._shared
            return (
                None if shared is None else _in_turn(shared, lambda weight: int4_linear(x, weight))
            )
        ids = torch.arange(len(x), device=self._device) % self._kind.slots
        if name == LAYER:
            bound = [BoundLayer(*both) for both in zip(self._ours, self._adapters, strict=True)]
            return _in_turn(bound, lambda layer: layer(x, ids))
        base = self._random(len(x), sum(self._kind.outputs))
        if name == ADAPTERS:
            return _in_turn(self._adapters, lambda lora: add_lora(base, x, lora, ids))
        assert name == STOCK_ADAPTERS
        return self._stock_adapters(base, x)

    @torch.inference_mode()  # as when serving: graphs depend on it
    def _random(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=self._device).to(self._kind.dtype)

    @cached_property
    def _ours(self) -> list[PreparedWeight]:
        return [prepare(weight) for weight in self._weights]

    @cached_property
    def _stock(self) -> list[tuple[CompressedTensorsWNA16, Any]]:
        return [_stock_layer(self._kind, weight) for weight in self._weights]

    @cached_property
    def _shared(self) -> list[PreparedWeight] | None:
        """The weights as vLLM's layers have them; None where our code cannot read them."""
        shared = [
            shared_weight(layer, weight)
            for (_, layer), weight in zip(self._stock, self._weights, strict=True)
        ]
        return [weight for weight in shared if weight is not None] or None

    @cached_property
    def _adapters(self) -> list[PreparedLoRA]:
        return [adapter_slots(*self._slots())[0] for _ in self._weights]

    def _slots(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the slots of a layer as vLLM allocates them."""
        kind = self._kind

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(kind.slots, 1, *shape, dtype=kind.dtype, device=self._device)

        a = [zeros(kind.rank, kind.inputs) for _ in kind.outputs]
        return a, [zeros(outputs, kind.rank) for outputs in kind.outputs]

    def _stock_adapters(self, base: Tensor, x: Tensor) -> Callable[[int], object] | None:
        """Return a call that adds adapters by vLLM's operators, or None where they do not run."""
        kind = self._kind
        adapters = range(1, kind.slots + 1)
        of_tokens = tuple(adapters[token % kind.slots] for token in range(len(x)))
        mapping = LoRAMapping(index_mapping=of_tokens, prompt_mapping=of_tokens, is_prefill=True)
        slots = [self._slots() for _ in self._weights]
        try:
            operators = get_punica_wrapper(
                len(x),
                max_batches=len(x),
                device=self._device,
                lora_config=get_current_vllm_config().lora_config,
            )
            operators.update_metadata(mapping, list(adapters), kind.slots, 1)
            add = _in_turn(
                slots, lambda slot: operators.add_lora_linear(base, x, *slot, 1.0, kind.outputs)
            )
            with torch.inference_mode():
                add(0)
        except Exception as error:  # Triton raises whatever its compilers do
            logger.warning("int4_lora: vLLM's adapters cannot be measured here: %s", error)
            return None
        return add


def _checked(kept: Any) -> dict[str, dict[str, float | None]]:
    """Return times from the disk if they are times, else none."""
    rows = kept.values() if isinstance(kept, dict) else [None]
    seconds = [list(row.values()) if isinstance(row, dict) else [""] for row in rows]
    right = all(
        time is None or (isinstance(time, float) and time > 0) for row in seconds for time in row
    )
    table: dict[str, dict[str, float | None]] = kept if right else {}
    return table


def _ours_is_slower(best: dict[str, float]) -> bool:
    ours, stock = (best.get(name, 0.0) for name in BASES)
    return ours > MARGIN * stock > 0


def _in_turn(
    operands: Sequence[Operand], call: Callable[[Operand], object]
) -> Callable[[int], object]:
    return lambda number: call(operands[number % len(operands)])


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
