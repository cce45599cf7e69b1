"""The arguments of a backend's functions, and how cases make them.

Source: ``docs/conformance.md``, "A backend".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import (
    AWQTensors,
    ExpertsLoRA,
    ExpertsWeight,
    Float4Weight,
    GPTQTensors,
    LoRASlice,
    LoRAStack,
    PackedWeight,
    from_awq,
    from_gptq,
    pack,
)
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.linear import as_slices
from int4_lora.reference.lora_stack import rows_of
from int4_lora.reference.moe import Activation

__all__ = [
    "Operands",
    "adapters",
    "float4_weight",
    "group_of_each_column",
    "tensors_of",
    "tokens",
    "weight",
]

TENSORS = ("codes", "packed", "x", "h", "adapter_ids", "bias", "topk_ids", "topk_weights")
SCALINGS = (2 / 3, 2.0, 0.37, -1.5, 1.25)  # none is 1, and no two are equal


@dataclass(frozen=True, eq=False)
class Operands:
    """The arguments of one call by name; None for those that the function does not have.

    Args:
        codes: int8, for ``pack``.
        packed: int32, for ``unpack``.
        size: for ``unpack``.
        dim: for ``pack`` and ``unpack``.
        weight: for ``dequantize`` and the layers.
        dtype: for ``dequantize``.
        x: ``[tokens, in_features]``, for the layers and ``shrink``.
        h: ``[tokens, rank]``, for ``expand``.
        lora: adapters or slices.
        adapter_ids: ``[tokens]``.
        bias: ``[out_features]``.
        layout: the tensors for ``from_gptq`` or ``from_awq``; a g_idx may be None.
        zero_plus_one: for ``from_gptq``.
        experts: for ``int4_moe``, as are all of these.
        topk_ids: ``[tokens, k]``.
        topk_weights: ``[tokens, k]``.
        experts_lora: the adapters of the experts.
        activation: "silu" or "gelu_tanh".
        weights_first: whether topk_weights multiply x.
    """

    codes: Tensor | None = None
    packed: Tensor | None = None
    size: int = 0
    dim: int = 1
    weight: PackedWeight | Float4Weight | None = None
    dtype: torch.dtype | None = None
    x: Tensor | None = None
    h: Tensor | None = None
    lora: LoRAStack | Sequence[LoRASlice] | None = None
    adapter_ids: Tensor | None = None
    bias: Tensor | None = None
    layout: GPTQTensors | AWQTensors | None = None
    zero_plus_one: bool = True
    experts: ExpertsWeight | None = None
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None
    experts_lora: ExpertsLoRA | None = None
    activation: Activation = "silu"
    weights_first: bool = False

    @property
    def packed_weight(self) -> PackedWeight | None:
        """The INT4 weight, or that which the tensors of another layout hold; None for FP4."""
        if isinstance(self.layout, GPTQTensors):
            return from_gptq(*self.layout, zero_plus_one=self.zero_plus_one)
        if isinstance(self.layout, AWQTensors):
            return from_awq(*self.layout)
        return self.weight if isinstance(self.weight, PackedWeight) else None

    @property
    def base_weight(self) -> PackedWeight | Float4Weight | None:
        """The weight, INT4 or FP4, or that which the tensors of another layout hold."""
        return self.weight if isinstance(self.weight, Float4Weight) else self.packed_weight

    @property
    def slices(self) -> tuple[LoRASlice, ...]:
        """The adapters as slices: none, one, or those given."""
        return as_slices(self.lora)

    @property
    def activations(self) -> Tensor:
        """The activations that are multiplied: ``x``, or the ``h`` of ``expand``.

        Raises:
            ValueError: both are None.
        """
        value = self.x if self.h is None else self.h
        if value is None:
            raise ValueError("there are no activations: x and h are None")
        return value

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return next(iter(tensors_of(self).values())).device

    def to(self, device: torch.device | str) -> Operands:
        """Return the same operands with every tensor on ``device``."""
        changed: dict[str, Any] = {}
        for name in (*TENSORS, "weight", "experts", "experts_lora"):
            value = getattr(self, name)
            changed[name] = None if value is None else value.to(device)
        if self.layout is not None:
            tensors = self.layout._asdict().items()
            moved = {name: tensor.to(device) for name, tensor in tensors if tensor is not None}
            changed["layout"] = self.layout._replace(**moved)
        if isinstance(self.lora, LoRAStack):
            changed["lora"] = self.lora.to(device)
        elif self.lora is not None:
            changed["lora"] = [
                dataclasses.replace(part, stack=part.stack.to(device)) for part in self.lora
            ]
        return dataclasses.replace(self, **changed)

    def with_tokens(self, chosen: Tensor) -> Operands:
        """Return the operands of some tokens alone.

        Args:
            chosen: int64, the tokens.
        """
        changed = {
            name: value[chosen.to(value.device)]
            for name in ("x", "h", "adapter_ids", "topk_ids", "topk_weights")
            if (value := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **changed)

    def with_outputs(self, start: int, stop: int) -> Operands:
        """Return the operands of the outputs ``[start, stop)`` alone."""
        index = torch.arange(start, stop, device=self.device)
        changed: dict[str, Any] = {}
        if self.weight is not None:
            changed["weight"] = self.weight.rows(index)
        if self.bias is not None:
            changed["bias"] = self.bias[start:stop]
        if self.lora is not None:
            slices = rows_of(self.slices, index)
            whole = isinstance(self.lora, LoRAStack)
            changed["lora"] = slices[0].stack if whole else slices or None
            changed["adapter_ids"] = self.adapter_ids if slices else None
        return dataclasses.replace(self, **changed)


def tensors_of(operands: Operands) -> dict[str, Tensor]:
    """Return every tensor of the operands by name: ``weight.scale``, ``lora.0.a`` and so on.

    Example:
        >>> list(tensors_of(Operands(x=torch.zeros(1, 8))))
        ['x']
    """
    tensors: dict[str, Tensor | None] = {}
    for name in TENSORS:
        tensors[name] = getattr(operands, name)
    if operands.weight is not None:
        tensors.update(_of_weight("weight", operands.weight))
    for index, (gate_up, down) in enumerate(_of_experts(operands)):
        tensors.update(_of_weight(f"experts.{index}.gate_up", gate_up))
        tensors.update(_of_weight(f"experts.{index}.down", down))
    if operands.experts_lora is not None:
        tensors.update(_of_experts_lora(operands.experts_lora))
    if operands.layout is not None:
        tensors.update(operands.layout._asdict())
    for index, part in enumerate(operands.slices):
        for name in ("a", "b", "scaling"):
            tensors[f"lora.{index}.{name}"] = getattr(part.stack, name)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _of_weight(prefix: str, weight: PackedWeight | Float4Weight) -> dict[str, Tensor | None]:
    """Return the tensors of a weight by name."""
    is_fp4 = isinstance(weight, Float4Weight)
    others = ("global_scale",) if is_fp4 else ("zero_point", "g_idx")
    return {f"{prefix}.{name}": getattr(weight, name) for name in ("packed", "scale", *others)}


def _of_experts(operands: Operands) -> Iterable[tuple[PackedWeight, PackedWeight]]:
    experts = operands.experts
    return () if experts is None else zip(experts.gate_up, experts.down, strict=True)


def _of_experts_lora(lora: ExpertsLoRA) -> dict[str, Tensor | None]:
    """Return the tensors of adapters by name: ``experts.3.down.lora.0.a`` and so on."""
    return {
        f"experts.{expert}.{layer}.lora.{index}.{name}": getattr(part.stack, name)
        for expert in range(lora.count)
        for layer in ("gate_up", "down")
        for index, part in enumerate(lora.slices(layer, expert))
        for name in ("a", "b", "scaling")
    }


def weight(
    draws: Draws,
    rows: int = 64,
    columns: int = 256,
    *,
    groups: int = 2,
    strategy: str = "group",
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    g_idx: str | None = None,
    block: tuple[int, int] = (16, 32),
    what: str = "weight",
) -> PackedWeight:
    """Return a random weight whose scales all differ, so that swapping two groups shows.

    Args:
        draws: the random numbers.
        rows: out_features.
        columns: in_features.
        groups: scales per row, for the strategy "group"; 1 is "channel".
        strategy: "group", "tensor" or "block".
        symmetric: whether there are no zero-points.
        dtype: of the scales.
        g_idx: None, "balanced", "unbalanced" or "minus_one".
        block: rows and columns that share a scale, for the strategy "block".
        what: the name under which the numbers are drawn.
    """
    codes = draws.integers(f"{what}.codes", (rows, columns), -8, 7).to(torch.int8)
    table = {"tensor": (1,), "block": (-(-rows // block[0]), -(-columns // block[1]))}.get(
        strategy, (rows, groups)
    )
    scale = (draws.uniform(f"{what}.scale", table) + 0.2) * 0.05
    zero_point = draws.integers(f"{what}.zero_point", table, -8, 7).to(torch.int8)
    if strategy == "group":
        zero_point = pack(zero_point, dim=0)
    return PackedWeight(
        packed=pack(codes),
        scale=scale.to(dtype),
        shape=(rows, columns),
        zero_point=None if symmetric else zero_point,
        g_idx=group_of_each_column(draws, what, g_idx, columns, groups),
        group_size=block if strategy == "block" else None,
    )


def float4_weight(
    draws: Draws, name: str, rows: int = 64, columns: int = 256, *, what: str = "weight"
) -> Float4Weight:
    """Return a random FP4 weight whose scales differ, so that swapping two groups shows.

    Args:
        draws: the random numbers.
        name: "nvfp4" or "mxfp4".
        rows: out_features.
        columns: in_features.
        what: the name under which the numbers are drawn.
    """
    packed = draws.integers(f"{what}.packed", (rows, columns // 2), 0, 255).to(torch.uint8)
    if name == "mxfp4":
        scale = draws.integers(f"{what}.scale", (rows, columns // 32), 120, 124)
        return Float4Weight(packed, scale.to(torch.uint8), (rows, columns))
    scale = draws.integers(f"{what}.scale", (rows, columns // 16), 0x60, 0x7D)  # 32 to 416
    global_scale = ((1 + draws.uniform(f"{what}.global_scale", (1,))) * 2048).to(torch.float32)
    e4m3 = scale.to(torch.uint8).view(torch.float8_e4m3fn)
    return Float4Weight(packed, e4m3, (rows, columns), global_scale)


def group_of_each_column(
    draws: Draws, what: str, how: str | None, columns: int, groups: int
) -> Tensor | None:
    """Return a random g_idx: int32 ``[columns]``, or None.

    Args:
        draws: the random numbers.
        what: the name under which the numbers are drawn.
        how: None, "balanced", "unbalanced" or "minus_one".
        columns: in_features.
        groups: scales per row.
    """
    if how is None:
        return None
    if how == "unbalanced":
        squared = draws.uniform(f"{what}.g_idx", (columns,)) ** 2  # the first groups get more
        return (squared * groups).floor().to(torch.int32)
    g_idx = (draws.permutation(f"{what}.g_idx", columns) // (columns // groups)).to(torch.int32)
    if how == "minus_one":
        g_idx[columns // 2] = -1
    return g_idx


def adapters(
    draws: Draws,
    rows: int = 64,
    columns: int = 256,
    *,
    count: int = 3,
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    what: str = "lora",
) -> LoRAStack:
    """Return random adapters of falling ranks, from ``rank`` on, and of different scalings.

    The deltas are about as large as the base of ``weight``, so that a fault in them is not small.
    """
    triples, first = [], int(draws.integers(f"{what}.first", (1,), 0, len(SCALINGS) - 1))
    for index in range(count):
        height = max(1, rank - index)
        a = draws.normal(f"{what}.{index}.a", (height, columns)) * 0.1
        b = draws.normal(f"{what}.{index}.b", (rows, height)) * (1.5 / height**0.5)
        triples.append((a.to(dtype), b.to(dtype), SCALINGS[(first + index) % len(SCALINGS)]))
    return LoRAStack.stack(triples)


def tokens(
    draws: Draws, count: int = 16, columns: int = 256, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return random activations ``[count, columns]``."""
    return draws.normal("x", (count, columns)).to(dtype)
