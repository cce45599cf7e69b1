"""Cases of adapters: ``shrink``, ``expand`` and ``int4_lora_linear``.

Source: ``docs/numerics.md``; what multi-adapter kernels have had wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.format import FLOATS, WEIGHTS
from int4_lora.reference.conformance.cases.lora_operands import (
    base_overflows,
    exact,
    mixed_ids,
    same_but_scaling,
    special_tokens,
    special_weight,
    strided_layer,
    unused_not_finite,
    with_adapters,
)
from int4_lora.reference.conformance.cases.operands import Operands, tokens, weight

__all__ = ["lora_cases"]

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
    """Yield the cases of adapters."""
    for short, dtype in FLOATS.items():
        yield from _of_dtype(short, dtype)
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
        base_overflows,
    )


def _crossings() -> Iterator[Case]:
    """Yield layers with adapters on what is asked of the base alone, too."""
    bf16 = torch.bfloat16
    for name, exercises, make in (
        ("scale_fp32", "scales of a wider dtype", with_adapters(bf16, scale_dtype=torch.float32)),
        ("bias_fp32", "a bias of a wider dtype", with_adapters(bf16, bias=torch.float32)),
        ("special_x", "a NaN and an infinity in their own tokens", special_tokens),
        ("special_scales", "scales of every class", special_weight),
        ("non_contiguous", "operands that are views with strides", strided_layer),
    ):
        yield _case(f"{name}/bf16", f"adapters and {exercises}", make)
    yield _case(
        "mixed/fp64",
        "float64 activations, summed in float64",
        with_adapters(torch.float64, scale_dtype=torch.float32),
    )


def _case(name: str, exercises: str, make: Callable[[Draws], Operands], **flags: Any) -> Case:
    return Case(f"int4_lora_linear/{name}", exercises, "int4_lora_linear", make, **flags)


def _of_dtype(short: str, dtype: torch.dtype) -> Iterator[Case]:
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
        lambda draws: exact(draws, dtype),
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
    ("all_minus_one", "adapters are there, no token uses one", [-1] * 16, True),
    ("one_used", "three adapters are there, all tokens use the second", [1] * 16, False),
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
        lambda draws: same_but_scaling(draws),
        quick=True,
    )
    yield _case(
        "unused_not_finite/bf16",
        "an adapter of NaN and infinity that no token uses",
        lambda draws: unused_not_finite(draws),
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
