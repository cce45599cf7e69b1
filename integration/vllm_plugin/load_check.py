"""Each kind of layer held against the reference before it serves anybody.

A layer is run as it will be, on random x and random adapters, and some of its rows are compared
with the reference's float64 result: within ``error_bound`` at the roundings that the formulation
declares, and in the mean (RMS) at most twice as far off as the reference itself in the dtype of x,
with the weight rounded or not as declared.

Source: ``docs/numerics.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from int4_lora.compiled import (
    PreparedLoRA,
    PreparedWeight,
    add_lora,
    formulation_for,
    int4_lora_linear,
)
from int4_lora.compiled.adapters.prepared import PreparedSlice
from int4_lora.compiled.graphs.cache import bucket_of
from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight, error_bound
from int4_lora.reference import int4_lora_linear as reference_linear

__all__ = [
    "fault_of_addition",
    "fault_of_layer",
    "graph_key_of_layer",
    "tokens_of_each_graph",
]

BLOCK, BLOCKS = 8, 32  # rows that share words of zero-points, and how many such blocks are compared
RMS = 2.0  # times the reference's own error in the dtype of x


def tokens_of_each_graph(most: int, graph_of: Callable[[int], Hashable]) -> list[int]:
    """Return one number of tokens for each graph that up to ``most`` tokens meet.

    Args:
        most: tokens.
        graph_of: what the graph is told by, at a number of tokens.

    Example:
        >>> tokens_of_each_graph(40, lambda tokens: tokens > 8)
        [2, 10]
    """
    met: dict[Hashable, list[int]] = {}
    for tokens in range(1, most + 1):
        met.setdefault(graph_of(tokens), []).append(tokens)
    return [several[:2][-1] for several in met.values()]  # the second: no multiple of anything


def graph_key_of_layer(
    weight: PreparedWeight, dtype: torch.dtype, tokens: int, lora: PreparedLoRA | None = None
) -> Hashable:
    """Return what a layer's graph is told by, beside the kind of layer, at a number of tokens."""
    formulation = formulation_for(weight, dtype, tokens, lora)
    return formulation.name, bucket_of(tokens, weight.device.type)


@torch.inference_mode()
def fault_of_layer(
    weight: PackedWeight,
    prepared: PreparedWeight,
    dtype: torch.dtype,
    tokens: int,
    lora: PreparedLoRA | None = None,
    bias: Tensor | None = None,
) -> str | None:
    """Return what is wrong with a layer at a number of tokens, or None.

    Args:
        weight: the checkpoint's tensors.
        prepared: the same as they are computed with.
        dtype: of x.
        tokens: rows of x.
        lora: slots of the sizes that will be used; random adapters of those sizes are taken.
        bias: ``[out_features]`` or None.
    """
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(prepared.device, dtype)
    adapters, ids = _random_adapters(lora, tokens, generator)
    y = int4_lora_linear(x, prepared, adapters, ids, bias)
    rows = _sampled_rows(weight.shape[0], generator).to(prepared.device)
    used = formulation_for(prepared, dtype, tokens, adapters)
    few = _rows_of(weight, rows)
    slices = _slices_of(adapters, rows)
    own = None if bias is None else bias[rows]
    operands = (few, slices or None, ids if slices else None, own)
    bound = error_bound(
        x, *operands, weight_rounded=used.weight_rounded, base_rounded=used.base_rounded
    )
    exact = reference_linear(x.double(), *operands)
    if not used.weight_rounded:  # the yardstick keeps (q - z) * s in float32, too
        few = dataclasses.replace(few, scale=few.scale.float())
    eager = reference_linear(x, few, *operands[1:])
    return _fault(y[:, rows], exact, bound, eager)


@torch.inference_mode()
def fault_of_addition(
    lora: PreparedLoRA, outputs: int, dtype: torch.dtype, tokens: int
) -> str | None:
    """Return what is wrong with adding adapters to a base of ``outputs``, or None."""
    generator = torch.Generator().manual_seed(tokens)
    first = lora.slices[0].a
    x = torch.randn(tokens, first.shape[2], generator=generator).to(first.device, dtype)
    base = torch.randn(tokens, outputs, generator=generator).to(first.device, dtype)
    adapters, ids = _random_adapters(lora, tokens, generator)
    assert adapters is not None
    assert ids is not None
    y = add_lora(base, x, adapters, ids)
    zero = _zero_weight(outputs, x)
    slices = [one.lora_slice() for one in adapters.slices]
    bound = error_bound(x, zero, slices, ids, base_rounded=True)
    delta = reference_linear(x.double(), zero, slices, ids)
    exact = base.double() + delta
    eager = (base.double() + reference_linear(x.float(), zero, slices, ids)).to(dtype)
    last_rounding = exact.abs() * torch.finfo(dtype).eps
    return _fault(y, exact, bound + last_rounding, eager)


def _fault(y: Tensor, exact: Tensor, bound: Tensor, eager: Tensor) -> str | None:
    if y.shape != exact.shape or y.dtype != eager.dtype:
        return f"{list(y.shape)} in {y.dtype} where {list(exact.shape)} in {eager.dtype} is right"
    error = (y.double() - exact).abs()
    wrong = ~(error <= bound)  # NaN is wrong
    if wrong.any():
        token, row = (int(index) for index in wrong.nonzero()[0])
        found, right = float(y[token, row]), float(exact[token, row])
        return (
            f"{int(wrong.sum())} outputs beyond the bound, the first {found:.6g}, not {right:.6g}"
        )
    rms, allowed = (float(one.square().mean().sqrt()) for one in (error, eager.double() - exact))
    if rms > RMS * allowed:
        return f"RMS error {rms:.3g}, more than {RMS:g} times the reference's {allowed:.3g}"
    return None


def _sampled_rows(out_features: int, generator: torch.Generator) -> Tensor:
    """Return ascending rows: whole blocks, the first and the last among them."""
    blocks = -(-out_features // BLOCK)
    chosen = {0, blocks - 1, *torch.randperm(blocks, generator=generator)[:BLOCKS].tolist()}
    rows = torch.tensor([BLOCK * block + row for block in sorted(chosen) for row in range(BLOCK)])
    return rows[rows < out_features]


def _rows_of(weight: PackedWeight, rows: Tensor) -> PackedWeight:
    """Return some rows of a weight, which must be whole blocks."""
    zero_point = weight.zero_point
    if zero_point is not None:
        zero_point = zero_point[rows[::BLOCK] // BLOCK]
    return PackedWeight(
        weight.packed[rows],
        weight.scale[rows],
        (len(rows), weight.shape[1]),
        zero_point,
        None,
        weight.group_size,
    )


def _slices_of(lora: PreparedLoRA | None, rows: Tensor) -> list[LoRASlice]:
    """Return what the adapters write to some rows."""
    found = []
    for one in () if lora is None else lora.slices:
        own = rows[(rows >= one.start) & (rows < one.stop)]
        if len(own):
            b = one.bt.transpose(1, 2)[:, own - one.start]
            start = int((rows < one.start).sum())
            found.append(LoRASlice(LoRAStack(one.a, b, one.scaling), start))
    return found


def _random_adapters(
    lora: PreparedLoRA | None, tokens: int, generator: torch.Generator
) -> tuple[PreparedLoRA | None, Tensor | None]:
    """Return random adapters of the sizes of given ones, and ids of all of them and of none."""
    if lora is None:
        return None, None
    with torch.inference_mode(False):  # as the slots themselves are made
        slices = []
        for one in lora.slices:
            a, bt = (torch.randn(of.shape, generator=generator).to(of) for of in (one.a, one.bt))
            scaling = torch.ones_like(one.scaling)
            slices.append(PreparedSlice(a / a.shape[2] ** 0.5, bt, scaling, one.start))
        ids = torch.randint(-1, lora.adapters, (tokens,), generator=generator)
        return PreparedLoRA(tuple(slices)), ids.to(slices[0].a.device)


def _zero_weight(outputs: int, x: Tensor) -> PackedWeight:
    """Return an INT4 weight of zeros, for the reference of a delta alone."""
    words = torch.full((outputs, -(-x.shape[1] // 8)), -2004318072, dtype=torch.int32)  # 0x88888888
    scale = torch.ones(outputs, 1, dtype=x.dtype)
    return PackedWeight(words.to(x.device), scale.to(x.device), (outputs, x.shape[1]))
