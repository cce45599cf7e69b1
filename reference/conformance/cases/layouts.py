"""Cases of the layouts of GPTQ and AWQ: what their tensors mean.

No case stores the zero-point 16 of GPTQ's version 1, nor 15 in version 2: a reader that takes one
version for the other would then have no INT4 zero-point.

Source: ``docs/format.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import AWQTensors, GPTQTensors, pack
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.operands import Operands, group_of_each_column

__all__ = ["layout_cases"]

FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}

# name: (what it exercises, arguments of ``_gptq``, whether it is quick)
GPTQ: dict[str, tuple[str, dict[str, Any], bool]] = {
    "version_1": ("zero-points are stored minus 1", {}, True),
    "version_2": ("zero-points are stored as they are", {"zero_plus_one": False}, True),
    "symmetric": ("every zero-point is 8", {"zeros": (7, 7)}, False),
    "channel": ("one scale for a row", {"groups": 1}, False),
    "g_idx": ("columns of a group are not beside each other", {"g_idx": "balanced"}, True),
    "g_idx_unbalanced": ("groups of different numbers of columns", {"g_idx": "unbalanced"}, False),
}
AWQ: dict[str, tuple[str, dict[str, Any], bool]] = {
    "group_32": ("outputs in AWQ's order, groups of 32 columns", {}, True),
    "group_128": (
        "outputs in AWQ's order, groups of 128 columns",
        {"columns": 256, "groups": 2},
        False,
    ),
    "channel": ("outputs in AWQ's order, one scale for a row", {"groups": 1}, False),
    "columns_44": ("44 columns in 4 groups: no multiple of 8", {"columns": 44}, True),
}


def layout_cases() -> Iterator[Case]:
    """Yield the cases of ``from_gptq`` and ``from_awq``."""
    for function, cases, make in (("from_gptq", GPTQ, _gptq), ("from_awq", AWQ, _awq)):
        for name, (exercises, arguments, quick) in cases.items():
            for short, dtype in FLOATS.items():
                yield Case(
                    f"{function}/{name}/{short}",
                    f"(u - z) * s, rounded once: {exercises}",
                    function,
                    make(dtype, **arguments),
                    quick=quick and short == "fp16",
                )


def _gptq(
    dtype: torch.dtype,
    *,
    rows: int = 24,
    columns: int = 128,
    groups: int = 4,
    zeros: tuple[int, int] = (0, 14),
    zero_plus_one: bool = True,
    g_idx: str | None = None,
) -> Callable[[Draws], Operands]:
    """Return a function that makes GPTQ's tensors with stored zero-points from ``zeros``."""

    def make(draws: Draws) -> Operands:
        tensors = GPTQTensors(
            qweight=_words(draws, "qweight", (columns, rows), dim=0),
            qzeros=pack((draws.integers("qzeros", (groups, rows), *zeros) - 8).to(torch.int8)),
            scales=_scales(draws, (groups, rows), dtype),
            g_idx=group_of_each_column(draws, "gptq", g_idx, columns, groups),
        )
        return Operands(layout=tensors, zero_plus_one=zero_plus_one)

    return make


def _awq(
    dtype: torch.dtype, *, rows: int = 24, columns: int = 128, groups: int = 4
) -> Callable[[Draws], Operands]:
    """Return a function that makes AWQ's tensors: random words are random codes in any order."""

    def make(draws: Draws) -> Operands:
        return Operands(
            layout=AWQTensors(
                qweight=_words(draws, "qweight", (columns, rows), dim=1),
                qzeros=_words(draws, "qzeros", (groups, rows), dim=1),
                scales=_scales(draws, (groups, rows), dtype),
            )
        )

    return make


def _words(draws: Draws, what: str, shape: tuple[int, int], dim: int) -> Tensor:
    return pack(draws.integers(what, shape, -8, 7).to(torch.int8), dim=dim)


def _scales(draws: Draws, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return scales that all differ, so that swapping two groups or outputs shows."""
    return ((draws.uniform("scales", shape) + 0.2) * 0.05).to(dtype)
