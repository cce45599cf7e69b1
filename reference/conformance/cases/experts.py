"""Cases of experts: ``int4_moe``.

Source: ``docs/numerics.md``, "Experts"; the faults of fused experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import ExpertsLoRA, ExpertsWeight, LoRASlice, LoRAStack, PackedWeight
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.format import FLOATS
from int4_lora.reference.conformance.cases.lora import mixed_ids
from int4_lora.reference.conformance.cases.operands import Operands, adapters, tokens, weight

__all__ = ["expert_cases", "with_experts"]

BF16 = torch.bfloat16
Options = dict[str, Any]  # of ``with_experts``


def expert_cases() -> Iterator[Case]:
    """Yield the cases of ``int4_moe``."""
    for short, dtype in FLOATS.items():
        yield _case(
            f"mixed/{short}",
            "each token with its own experts and its own adapter, or none",
            with_experts(dtype),
            quick=True,
        )
    for short in ("bf16", "fp32"):
        dtype, quick = FLOATS[short], short == "bf16"
        for name, exercises, make in (
            ("no_adapters", "experts alone", with_experts(dtype, lora=False)),
            ("gelu_tanh", "GELU in its tanh form", with_experts(dtype, activation="gelu_tanh")),
            ("weights_first", "routed weights times x", with_experts(dtype, weights_first=True)),
        ):
            yield _case(f"{name}/{short}", exercises, make, quick=quick and name != "no_adapters")
    yield _case(
        "mixed/fp64",
        "float64 activations, summed in float64",
        with_experts(torch.float64, scale_dtype=torch.float32),
    )
    yield from _of_routing()
    yield from _of_adapters()
    yield from _of_weights()
    for procedure, exercises in (
        ("alone", "a token alone has the same answer as in a batch"),
        ("repeat", "a repeated call gives the same bits"),
        ("unmodified", "no operand is written to"),
        ("written", "every output is written, on poisoned memory"),
    ):
        make = with_experts(BF16)
        yield _case(f"{procedure}/bf16", exercises, make, procedure=procedure)


def _case(name: str, exercises: str, make: Callable[[Draws], Operands], **flags: Any) -> Case:
    return Case(f"int4_moe/{name}", exercises, "int4_moe", make, **flags)


def _of_routing() -> Iterator[Case]:
    make: Callable[[Draws], Operands]
    for name, exercises, make, quick in (
        ("one_expert", "a single expert", with_experts(BF16, experts=1, k=1), False),
        ("top_1", "one expert for each token", with_experts(BF16, k=1), False),
        (
            "top_8",
            "eight experts for each token, which are all",
            with_experts(BF16, experts=8, k=8),
            False,
        ),
        (
            "experts_16",
            "sixteen experts, each used once",
            with_experts(BF16, experts=16, k=1),
            False,
        ),
        ("same_expert_twice", "an expert twice in a token's list", _same_twice, True),
        ("dropped", "experts with the id -1", _dropped, True),
        ("all_dropped", "tokens all of whose experts have the id -1", _all_dropped, False),
        ("unused_not_finite", "an expert of NaN that no token uses", _unused_not_finite, True),
        ("weights_of_0", "routed weights of 0", _weights_of_0, False),
        ("large_weights", "routed weights that do not sum to 1", _large_weights, False),
        (
            "weights_bf16",
            "routed weights in the dtype of x",
            with_experts(BF16, p_dtype=BF16),
            False,
        ),
        ("ids_int32", "ids in int32", _int32, False),
        ("tokens_0", "no tokens", with_experts(BF16, count=0), False),
        ("tokens_1", "one token", with_experts(BF16, count=1), False),
        ("tokens_65", "65 tokens", with_experts(BF16, count=65), False),
    ):
        yield _case(f"{name}/bf16", exercises, make, quick=quick)


def _of_adapters() -> Iterator[Case]:
    make: Callable[[Draws], Operands]
    for name, exercises, make, quick in (
        ("some_adapted", "adapters on some experts only", _some_adapted, True),
        ("gate_up_adapted", "adapters on gate and up only", with_experts(BF16, down=False), False),
        ("down_adapted", "adapters on down only", with_experts(BF16, gate_up=False), False),
        ("gate_and_up_apart", "different adapters for gate and for up", _apart, False),
        ("shared", "A of gate and up, and B of down, that all experts share", _shared, False),
        ("one_adapter", "the same adapter for all tokens", with_experts(BF16, adapter=1), False),
        ("minus_one", "adapters that no token uses", with_experts(BF16, adapter=-1), False),
        (
            "adapters_7",
            "seven adapters of five experts",
            with_experts(BF16, adapters_count=7, experts=5, count=32),
            False,
        ),
        ("rank_1", "adapters of rank 1", with_experts(BF16, rank=1), False),
        ("rank_64", "adapters of rank 64", with_experts(BF16, rank=64), False),
    ):
        yield _case(f"{name}/bf16", exercises, make, quick=quick)


def _of_weights() -> Iterator[Case]:
    wide: Options = {"hidden": 256, "inter": 128, "experts": 3}
    variants: tuple[tuple[str, str, Options], ...] = (
        ("group_32_asym", "groups of 32, with zero-points", {"symmetric": False}),
        ("group_128", "groups of 128", {"group": 128, **wide}),
        (
            "group_128_asym",
            "groups of 128, with zero-points",
            {"group": 128, "symmetric": False, **wide},
        ),
        ("channel", "one scale for each row", {"group": None}),
        ("g_idx", "columns in the order of g_idx", {"g_idx": "balanced"}),
        (
            "ragged",
            "widths that are no multiples of 8",
            {"hidden": 44, "inter": 26, "group": None, "count": 24},
        ),
        ("scale_fp32", "scales of a wider dtype", {"scale_dtype": torch.float32}),
    )
    for name, exercises, options in variants:
        yield _case(f"{name}/bf16", exercises, with_experts(BF16, **options))


def with_experts(
    dtype: torch.dtype,
    *,
    count: int = 16,
    hidden: int = 64,
    inter: int = 32,
    experts: int = 4,
    k: int = 2,
    group: int | None = 32,
    symmetric: bool = True,
    g_idx: str | None = None,
    scale_dtype: torch.dtype | None = None,
    p_dtype: torch.dtype = torch.float32,
    lora: bool = True,
    gate_up: bool = True,
    down: bool = True,
    rank: int = 6,
    adapters_count: int = 3,
    adapter: int | None = None,
    **call: Any,
) -> Callable[[Draws], Operands]:
    """Return a function that makes experts with adapters.

    Args:
        dtype: of x, of the adapters, and of the scales unless ``scale_dtype`` is given.
        count: tokens.
        hidden: the width of x.
        inter: the width between the layers of an expert.
        experts: experts.
        k: experts of each token.
        group: columns that share a scale, None for a row.
        symmetric: whether there are no zero-points.
        g_idx: as in ``operands.weight``.
        scale_dtype: of the scales.
        p_dtype: of the routed weights.
        lora: whether there are adapters.
        gate_up: whether gate and up have adapters.
        down: whether down has.
        rank: the largest rank.
        adapters_count: adapters.
        adapter: that of all tokens; None for different ones.
        call: ``activation`` and ``weights_first``.
    """

    def make(draws: Draws) -> Operands:
        def layer(what: str, rows: int, columns: int) -> PackedWeight:
            return weight(
                draws,
                rows,
                columns,
                groups=1 if group is None else columns // group,
                symmetric=symmetric,
                g_idx=g_idx,
                dtype=scale_dtype or dtype,
                what=what,
            )

        def stack(what: str, rows: int, columns: int) -> LoRAStack:
            options = {"count": adapters_count, "rank": rank, "dtype": dtype}
            return adapters(draws, rows, columns, what=f"{what}.lora", **options)  # type: ignore[arg-type]

        shapes = {"gate_up": (2 * inter, hidden), "down": (hidden, inter)}
        layers = {
            name: [layer(f"{index}.{name}", *shape) for index in range(experts)]
            for name, shape in shapes.items()
        }
        stacks = {
            name: [stack(f"{index}.{name}", *shape) for index in range(experts)]
            for name, shape in shapes.items()
        }
        ids, p = _routing(draws, count, experts, k)
        adapter_ids = mixed_ids(draws, count, adapters_count)
        if adapter is not None:
            adapter_ids = torch.full((count,), adapter)
        given = {"gate_up": gate_up, "down": down}
        chosen = {name: stacks[name] if given[name] else None for name in stacks}
        return Operands(
            x=tokens(draws, count, hidden, dtype),
            experts=ExpertsWeight(**layers),
            topk_ids=ids,
            topk_weights=p.to(p_dtype),
            experts_lora=ExpertsLoRA(**chosen) if lora else None,
            adapter_ids=adapter_ids if lora else None,
            **call,
        )

    return make


def _routing(draws: Draws, count: int, experts: int, k: int) -> tuple[Tensor, Tensor]:
    """Return k different experts for each token, every expert used if the tokens suffice, and p."""
    first = draws.permutation("experts", count)[:, None] % experts
    order = draws.uniform("scores", (count, experts))
    order.scatter_(1, first, 2.0)  # the first expert of a token is certain
    ids = order.argsort(dim=1, descending=True, stable=True)[:, :k]
    scores = draws.uniform("weights", (count, k)) + 0.1
    return ids, scores / scores.sum(dim=1, keepdim=True)


def _same_twice(draws: Draws) -> Operands:
    """Make tokens of which each second one has one expert in both of its slots."""
    layer = with_experts(BF16)(draws)
    ids = layer.topk_ids.clone()  # type: ignore[union-attr]
    ids[::2, 1] = ids[::2, 0]
    return dataclasses.replace(layer, topk_ids=ids)


def _dropped(draws: Draws) -> Operands:
    """Make tokens of which some lack their first expert, some their second."""
    layer = with_experts(BF16)(draws)
    ids = layer.topk_ids.clone()  # type: ignore[union-attr]
    ids[::3, 0] = -1
    ids[1::3, 1] = -1
    return dataclasses.replace(layer, topk_ids=ids)


def _all_dropped(draws: Draws) -> Operands:
    """Make tokens of which some have no expert left."""
    layer = _dropped(draws)
    ids = layer.topk_ids.clone()  # type: ignore[union-attr]
    ids[5:9] = -1
    return dataclasses.replace(layer, topk_ids=ids)


def _unused_not_finite(draws: Draws) -> Operands:
    """Make four experts whose first and last are NaN; no token uses them, some drop an expert."""
    layer = with_experts(BF16)(draws)
    experts, ids = layer.experts, layer.topk_ids
    if experts is None or ids is None:
        raise ValueError("with_experts makes experts and ids")
    down = list(experts.down)
    for expert in (0, -1):
        down[expert] = dataclasses.replace(
            down[expert], scale=torch.full_like(down[expert].scale, float("nan"))
        )
    ids = 1 + ids % 2
    ids[3, 1] = -1
    return dataclasses.replace(layer, experts=ExpertsWeight(experts.gate_up, down), topk_ids=ids)


def _weights_of_0(draws: Draws) -> Operands:
    """Make tokens of which some have a routed weight of 0, or only such."""
    layer = with_experts(BF16)(draws)
    p = layer.topk_weights.clone()  # type: ignore[union-attr]
    p[::4, 0] = 0.0
    p[2] = 0.0
    return dataclasses.replace(layer, topk_weights=p)


def _large_weights(draws: Draws) -> Operands:
    """Make routed weights of both signs that are not normalised."""
    layer = with_experts(BF16)(draws)
    p = draws.normal("large", (16, 2)).to(torch.float32) * 3
    return dataclasses.replace(layer, topk_weights=p)


def _int32(draws: Draws) -> Operands:
    layer = with_experts(BF16)(draws)
    changed: dict[str, Any] = {
        name: getattr(layer, name).to(torch.int32) for name in ("topk_ids", "adapter_ids")
    }
    return dataclasses.replace(layer, **changed)


def _some_adapted(draws: Draws) -> Operands:
    """Make four experts: adapters on both layers, on gate and up, on none, on down."""
    layer = with_experts(BF16)(draws)
    lora = _lora(layer)
    gate_up, down = list(lora.gate_up or ()), list(lora.down or ())
    down[1] = gate_up[2] = down[2] = gate_up[3] = None
    return dataclasses.replace(layer, experts_lora=ExpertsLoRA(gate_up, down))


def _apart(draws: Draws) -> Operands:
    """Make adapters that gate and up do not share."""
    layer = with_experts(BF16)(draws)
    gate_up: list[list[LoRASlice]] = []
    for expert in range(4):
        halves = [
            adapters(draws, 32, 64, rank=rank, what=f"{expert}.{name}")
            for name, rank in (("gate", 6), ("up", 3))
        ]
        gate_up.append([LoRASlice(halves[0], 0), LoRASlice(halves[1], 32)])
    return dataclasses.replace(layer, experts_lora=ExpertsLoRA(gate_up, _lora(layer).down))


def _shared(draws: Draws) -> Operands:
    """Make adapters whose A of gate and up, and B of down, are those of the first expert."""
    layer = with_experts(BF16)(draws)
    gate_up, down = (
        [part.stack for expert in range(4) for part in _lora(layer).slices(name, expert)]
        for name in ("gate_up", "down")
    )
    lora = ExpertsLoRA(
        [dataclasses.replace(gate_up[0], b=stack.b) for stack in gate_up],
        [dataclasses.replace(down[0], a=stack.a) for stack in down],
    )
    return dataclasses.replace(layer, experts_lora=lora)


def _lora(layer: Operands) -> ExpertsLoRA:
    if layer.experts_lora is None:
        raise ValueError("the experts have no adapters")
    return layer.experts_lora
