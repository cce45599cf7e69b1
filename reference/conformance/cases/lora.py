"""Cases of adapters: ``shrink``, ``expand`` and ``int4_lora_linear``.

Source: ``docs/numerics.md``; arXiv:2310.18547; the faults of multi-adapter kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import LoRASlice, LoRAStack, PackedWeight, pack
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.format import FLOATS, WEIGHTS, special, spread, strided
from int4_lora.reference.conformance.cases.operands import Operands, adapters, tokens, weight

__all__ = ["lora_cases", "mixed_ids", "with_adapters"]

ON = (
    "ragged_asym",
    "ragged_channel",
    "columns_330_asym",
    "columns_1096",
    "g_idx_unbalanced",
    "g_idx_asym",
    "group_32_asym",
    "channel",
    "tensor_asym",
    "block_asym",
)
QUARTERS = (("q", 0, 32), ("k", 32, 16), ("v", 48, 16))


def lora_cases() -> Iterator[Case]:
    """Yield the cases of ``int4_lora_linear``, ``shrink`` and ``expand``."""
    for short, dtype in FLOATS.items():
        yield from _of_x_dtype(short, dtype)
    yield from _of_ranks()
    yield from _of_ids()
    yield from _of_slices()
    for name in ON:
        exercises, arguments, quick = WEIGHTS[name]
        yield _case(
            f"on_{name}/bf16",
            f"adapters on a weight with {exercises}",
            with_adapters(torch.bfloat16, **arguments),
            quick=quick and name != "channel",
        )
    yield from _crossings()
    yield _case(
        "overflow_of_base/fp16",
        "a base beyond float16 that the delta brings back",
        _base_overflows,
    )
    yield from _shrink_and_expand()


def _crossings() -> Iterator[Case]:
    """Yield layers with adapters for what the cases of ``int4_linear`` ask of the base."""
    bf16 = torch.bfloat16
    for name, exercises, make in (
        ("scale_fp32", "scales of a wider dtype", with_adapters(bf16, scale_dtype=torch.float32)),
        ("bias_fp32", "a bias of a wider dtype", with_adapters(bf16, bias=torch.float32)),
        ("special_x", "a NaN and an infinity in their own tokens", _special_tokens),
        ("special_scales", "scales of every class", _special_weight),
        ("non_contiguous", "operands that are views with strides", _strided_layer),
    ):
        yield _case(f"{name}/bf16", f"adapters and {exercises}", make)
    yield _case(
        "mixed/fp64",
        "float64 activations, summed in float64",
        with_adapters(torch.float64, scale_dtype=torch.float32),
    )


def _case(name: str, exercises: str, make: Callable[[Draws], Operands], **flags: Any) -> Case:
    return Case(f"int4_lora_linear/{name}", exercises, "int4_lora_linear", make, **flags)


def _of_x_dtype(short: str, dtype: torch.dtype) -> Iterator[Case]:
    yield _case(
        f"mixed/{short}",
        "every token with its own adapter or none",
        with_adapters(dtype),
        quick=True,
    )
    yield _case(
        f"bias/{short}",
        "adapters and a bias",
        with_adapters(dtype, bias=dtype),
        quick=short == "bf16",
    )
    yield _case(
        f"exact/{short}",
        "powers of two and small integers: no rounding at all, in any order",
        lambda draws: _exact(draws, dtype),
        equal=True,
        quick=True,
    )
    yield _case(
        f"no_adapters/{short}",
        "lora=None: the base alone",
        lambda draws: Operands(x=tokens(draws, dtype=dtype), weight=weight(draws, dtype=dtype)),
    )


def _of_ranks() -> Iterator[Case]:
    for rank in (1, 3, 16, 64, 128, 512):
        yield _case(
            f"rank_{rank}/bf16",
            f"adapters of rank {rank}, and smaller ones padded with zeros",
            with_adapters(torch.bfloat16, rank=rank),
            quick=rank in (1, 3),
        )
    yield _case(
        "rank_512/fp32",
        "long sums in float32 over the rank",
        with_adapters(torch.float32, rank=512),
    )
    yield _case(
        "adapters_fp32/bf16",
        "adapters of a wider dtype than x",
        with_adapters(torch.bfloat16, lora_dtype=torch.float32),
    )


# name, what it exercises, 16 ids, whether it is quick
IDS = (
    ("all_minus_one", "three adapters, and no token uses any", [-1] * 16, True),
    ("one_used", "three adapters, and all tokens use the second", [1] * 16, False),
    ("descending", "ids that are not sorted", [2 - i // 4 for i in range(16)], False),
    ("last_minus_one", "one token without adapter", [2] * 15 + [-1], True),
)


def _fixed(ids: list[int]) -> Callable[[Draws], Tensor]:
    return lambda draws: torch.tensor(ids)


def _of_ids() -> Iterator[Case]:
    for name, exercises, chosen, quick in IDS:
        make = with_adapters(torch.bfloat16, ids=_fixed(chosen))
        yield _case(f"{name}/bf16", exercises, make, quick=quick)
    yield _case(
        "outputs_200/bf16",
        "200 outputs: no multiple of 64",
        with_adapters(torch.bfloat16, rows=200),
    )
    yield _case(
        "ids_int32/bf16",
        "ids in int32",
        with_adapters(torch.bfloat16, ids=lambda draws: mixed_ids(draws, 16, 3).to(torch.int32)),
    )
    for count, total in ((1, 16), (8, 18), (16, 34), (64, 130)):
        yield _case(
            f"adapters_{count}/bf16",
            f"{count} adapters, every one used",
            with_adapters(torch.bfloat16, adapters_count=count, count=total),
        )
    for count in (0, 1, 3, 65, 130):
        yield _case(
            f"tokens_{count}/bf16",
            f"{count} tokens at once",
            with_adapters(torch.bfloat16, count=count),
            quick=count == 1,
        )
    yield _case(
        "scaling/bf16",
        "adapters that differ in their scaling alone",
        _same_but_scaling,
        quick=True,
    )
    yield _case(
        "unused_not_finite/bf16",
        "an adapter of NaN and infinity that no token uses",
        _unused_not_finite,
        quick=True,
    )
    yield _case(
        "first_and_last_not_finite/bf16",
        "a first and a last adapter of NaN and infinity at some outputs, which no token uses",
        _ends_not_finite,
        quick=True,
    )


def _of_slices() -> Iterator[Case]:
    for name, exercises, parts, quick in (
        ("qkv", "adapters of three parts of unequal widths", QUARTERS, True),
        ("gate_up", "adapters of two equal parts", (("g", 0, 32), ("u", 32, 32)), True),
        ("gap", "outputs that no slice writes", (("a", 8, 16), ("b", 40, 8)), False),
        ("second_only", "a slice that does not start at 0", (("b", 32, 32),), False),
    ):
        for short in ("bf16", "fp32"):
            yield _case(
                f"slices_{name}/{short}",
                exercises,
                with_adapters(
                    FLOATS[short], slices=parts, bias=FLOATS[short] if name == "qkv" else None
                ),
                quick=quick and short == "bf16",
            )


def _shrink_and_expand() -> Iterator[Case]:
    for short, dtype in FLOATS.items():
        yield from _parts_of_dtype(short, dtype)
    yield from _parts_of_sizes()


def _parts_of_dtype(short: str, dtype: torch.dtype) -> Iterator[Case]:
    for function in ("shrink", "expand"):
        for ids in ("mixed", "all_minus_one"):
            yield Case(
                f"{function}/{ids}/{short}",
                f"{function} with ids that are {ids.replace('_', ' ')}",
                function,
                _one_part(function, dtype, 8, ids == "mixed"),
                quick=ids == "mixed" and short != "fp16",
            )
        yield Case(
            f"{function}/uneven/{short}",
            f"{function} of 330 columns and 24 outputs, at rank 5",
            function,
            _one_part(function, dtype, 5, True, rows=24, columns=330),
        )
        yield Case(
            f"{function}/rank_3/{short}",
            f"{function} of an odd rank",
            function,
            _one_part(function, dtype, 3, True),
        )


def _parts_of_sizes() -> Iterator[Case]:
    bf16 = torch.bfloat16
    options: dict[str, Any]
    for function in ("shrink", "expand"):
        for name, exercises, options in (
            ("tokens_0", "no tokens", {"count": 0}),
            ("tokens_1", "one token", {"count": 1}),
            ("tokens_65", "65 tokens", {"count": 65}),
            ("adapters_16", "16 adapters", {"count": 34, "adapters_count": 16}),
            ("ids_int32", "ids in int32", {"id_dtype": torch.int32}),
        ):
            make = _one_part(function, bf16, 8, True, **options)
            yield Case(f"{function}/{name}/bf16", f"{function} of {exercises}", function, make)
        yield Case(
            f"{function}/first_and_last_not_finite/bf16",
            f"{function} beside adapters of NaN and infinity, which no token uses",
            function,
            _part_beside_bad_ends(function),
            quick=True,
        )
        make = _one_part(function, bf16, 128, True)
        yield Case(f"{function}/rank_128/bf16", f"{function} of rank 128", function, make)


def _part_beside_bad_ends(function: str) -> Callable[[Draws], Operands]:
    """Return a function that makes operands whose first and last adapter are not finite."""

    def make(draws: Draws) -> Operands:
        part = _one_part(function, torch.bfloat16, 8, True, adapters_count=4)(draws)
        stack = _with_bad_ends(part.slices[0].stack)
        a = stack.a.clone()
        a[0, 1, 7], a[-1, 4, 9] = float("nan"), float("inf")
        ids = _ids_of_the_middle(draws)
        return dataclasses.replace(part, lora=dataclasses.replace(stack, a=a), adapter_ids=ids)

    return make


Lora = LoRAStack | Sequence[LoRASlice]


def mixed_ids(draws: Draws, count: int, adapters_count: int) -> Tensor:
    """Return ids that use every adapter and -1 if the tokens suffice: int64 ``[count]``."""
    order = draws.permutation("ids", count)
    return order % (adapters_count + 1) - 1


def with_adapters(
    dtype: torch.dtype,
    *,
    count: int = 16,
    rows: int = 64,
    columns: int = 256,
    rank: int = 8,
    adapters_count: int = 3,
    lora_dtype: torch.dtype | None = None,
    ids: Callable[[Draws], Tensor] | None = None,
    slices: Sequence[tuple[str, int, int]] | None = None,
    bias: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Callable[[Draws], Operands]:
    """Return a function that makes a layer with adapters.

    Args:
        dtype: of x; also of the adapters and the scales unless those are given.
        count: tokens.
        rows: out_features.
        columns: in_features.
        rank: the largest rank of an adapter.
        adapters_count: adapters.
        lora_dtype: of the adapters.
        ids: makes the adapter ids; by default ``mixed_ids``.
        slices: name, start and width of each slice; None for adapters of the whole output.
        bias: its dtype; None for no bias.
        scale_dtype: of the weight's scales.
        arguments: further arguments of ``operands.weight``.
    """

    def make(draws: Draws) -> Operands:
        def stack(height: int, what: str, smaller: int = 0) -> LoRAStack:
            return adapters(
                draws,
                height,
                columns,
                count=adapters_count,
                rank=rank - smaller,
                dtype=lora_dtype or dtype,
                what=what,
            )

        lora: Lora = stack(rows, "lora")
        if slices is not None:  # each with another rank and other scalings
            lora = [
                LoRASlice(stack(height, name, index), start)
                for index, (name, start, height) in enumerate(slices)
            ]
        return Operands(
            x=tokens(draws, count, columns, dtype),
            weight=weight(draws, rows, columns, dtype=scale_dtype or dtype, **arguments),
            lora=lora,
            adapter_ids=mixed_ids(draws, count, adapters_count) if ids is None else ids(draws),
            bias=None if bias is None else draws.normal("bias", (rows,)).to(bias),
        )

    return make


def _one_part(
    function: str,
    dtype: torch.dtype,
    rank: int,
    mixed: bool,
    *,
    rows: int = 64,
    columns: int = 256,
    count: int = 16,
    adapters_count: int = 3,
    id_dtype: torch.dtype = torch.int64,
) -> Callable[[Draws], Operands]:
    """Return a function that makes the operands of ``shrink`` or ``expand``."""

    def make(draws: Draws) -> Operands:
        stack = adapters(draws, rows, columns, count=adapters_count, dtype=dtype, rank=rank)
        ids = mixed_ids(draws, count, adapters_count) if mixed else torch.full((count,), -1)
        ids = ids.to(id_dtype)
        if function == "shrink":
            x = tokens(draws, count, columns, dtype)
            return Operands(x=x, lora=stack, adapter_ids=ids)
        h = draws.normal("h", (count, rank)).to(torch.float32)
        return Operands(h=h, lora=stack, adapter_ids=ids)

    return make


def _exact(draws: Draws, dtype: torch.dtype) -> Operands:
    """Make a layer whose base, delta and sums are small integers over a power of two."""
    codes = draws.integers("codes", (64, 128), -2, 2).to(torch.int8)
    scale = (2.0 ** draws.integers("scale", (64, 2), -1, 1).to(torch.float64)).to(dtype)
    x = torch.zeros(16, 128, dtype=torch.float64)
    x.scatter_(1, draws.integers("where", (16, 4), 0, 127), 1.0)
    a = draws.integers("a", (3, 4, 128), -1, 1).to(dtype)
    b = draws.integers("b", (3, 64, 4), -1, 1).to(dtype)
    return Operands(
        x=x.to(dtype),
        weight=PackedWeight(pack(codes), scale, shape=(64, 128)),
        lora=LoRAStack(a, b, torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)),
        adapter_ids=mixed_ids(draws, 16, 3),
    )


def _same_but_scaling(draws: Draws) -> Operands:
    """Make a layer whose adapters have the same A and B, and different scalings."""
    layer = with_adapters(torch.bfloat16)(draws)
    stack = layer.slices[0].stack
    same = LoRAStack(stack.a[:1].repeat(3, 1, 1), stack.b[:1].repeat(3, 1, 1), stack.scaling)
    return dataclasses.replace(layer, lora=same)


def _unused_not_finite(draws: Draws) -> Operands:
    """Make a layer whose second adapter holds a NaN and an infinity; no token uses it."""
    layer = with_adapters(torch.bfloat16)(draws)
    stack = layer.slices[0].stack
    a, b = stack.a.clone(), stack.b.clone()
    a[1, 0, 0] = float("nan")
    b[1, 3, 0] = float("inf")
    ids = layer.adapter_ids
    ids = torch.where(ids == 1, 2, ids) if ids is not None else None
    return dataclasses.replace(layer, lora=LoRAStack(a, b, stack.scaling), adapter_ids=ids)


def _ends_not_finite(draws: Draws) -> Operands:
    """Make a layer whose first and last adapter are not finite at one output; none uses them."""
    layer = with_adapters(torch.bfloat16, adapters_count=4, ids=_ids_of_the_middle)(draws)
    return dataclasses.replace(layer, lora=_with_bad_ends(layer.slices[0].stack))


def _ids_of_the_middle(draws: Draws) -> Tensor:
    """Return 16 ids of the second and third of four adapters and -1."""
    ids = mixed_ids(draws, 16, 2)
    return torch.where(ids < 0, ids, ids + 1)


def _with_bad_ends(stack: LoRAStack) -> LoRAStack:
    """Put a NaN in output 5 of the first adapter and an infinity in output 11 of the last."""
    b = stack.b.clone()
    b[0, 5, 0], b[-1, 11, 0] = float("nan"), float("inf")
    return dataclasses.replace(stack, b=b)


def _base_overflows(draws: Draws) -> Operands:
    """Make a layer whose first outputs have the base 256 * 7 * 40 and a delta of minus half."""
    codes = draws.integers("codes", (64, 256), -8, 7).to(torch.int8)
    codes[:8] = 7
    scale = torch.full((64, 2), 0.05, dtype=torch.float16)
    scale[:8] = 40.0
    x = torch.ones(16, 256, dtype=torch.float16)
    a = torch.full((1, 1, 256), 1.0, dtype=torch.float16)
    b = torch.zeros(1, 64, 1, dtype=torch.float16)
    b[0, :8] = -140.0
    return Operands(
        x=x,
        weight=PackedWeight(pack(codes), scale, shape=(64, 256)),
        lora=LoRAStack(a, b, torch.tensor([1.0], dtype=torch.float64)),
        adapter_ids=torch.zeros(16, dtype=torch.int64),
    )


def _special_tokens(draws: Draws) -> Operands:
    """Make a layer with a NaN in one token and an infinity in another."""
    layer = with_adapters(torch.bfloat16)(draws)
    x = tokens(draws)
    x[3, 17], x[5, 100] = float("nan"), float("inf")
    return dataclasses.replace(layer, x=x)


def _special_weight(draws: Draws) -> Operands:
    """Make a layer whose scales are of every class."""
    layer = with_adapters(torch.bfloat16)(draws)
    return dataclasses.replace(layer, weight=special(weight(draws)))


def _strided_layer(draws: Draws) -> Operands:
    """Make a layer whose x, ids, bias and weight are views with strides."""
    layer = with_adapters(torch.bfloat16, bias=torch.bfloat16)(draws)
    changed: dict[str, Any] = {
        name: spread(value)
        for name in ("x", "adapter_ids", "bias")
        if (value := getattr(layer, name)) is not None
    }
    return dataclasses.replace(layer, weight=strided(weight(draws)), **changed)
