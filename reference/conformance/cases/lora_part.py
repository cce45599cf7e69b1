"""Cases of ``shrink`` and ``expand``.

Source: ``docs/numerics.md``; arXiv:2310.18547.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.format import FLOATS
from int4_lora.reference.conformance.cases.lora_operands import one_part

__all__ = ["lora_part_cases"]


def lora_part_cases() -> Iterator[Case]:
    """Yield the cases of the two parts of an adapter's delta."""
    for short, dtype in FLOATS.items():
        yield from _of_dtype(short, dtype)
    yield from _of_sizes()


def _of_dtype(short: str, dtype: torch.dtype) -> Iterator[Case]:
    for function in ("shrink", "expand"):
        for ids in ("mixed", "all_minus_one"):
            yield Case(
                f"{function}/{ids}/{short}",
                f"{function} with ids that are {ids.replace('_', ' ')}",
                function,
                one_part(function, dtype, 8, ids == "mixed"),
                quick=ids == "mixed" and short != "fp16",
            )
        yield Case(
            f"{function}/uneven/{short}",
            f"{function} of 330 columns and 24 outputs, at rank 5",
            function,
            one_part(function, dtype, 5, True, rows=24, columns=330),
        )
        yield Case(
            f"{function}/rank_3/{short}",
            f"{function} of an odd rank",
            function,
            one_part(function, dtype, 3, True),
        )


def _of_sizes() -> Iterator[Case]:
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
            make = one_part(function, bf16, 8, True, **options)
            yield Case(f"{function}/{name}/bf16", f"{function} of {exercises}", function, make)
        make = one_part(function, bf16, 128, True)
        yield Case(f"{function}/rank_128/bf16", f"{function} of rank 128", function, make)
