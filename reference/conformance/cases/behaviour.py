"""Cases of behaviour: faults that a single call does not show.

Source: ggml's test-backend-ops, which repeats each case because later replays broke.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.format import FLOATS
from int4_lora.reference.conformance.cases.lora import with_adapters
from int4_lora.reference.conformance.cases.operands import Operands, adapters, weight

__all__ = ["behaviour_cases"]


# procedure, what it exercises, dtypes of x
PROCEDURES = (
    ("alone", "a token alone has the same answer as in a batch", ("bf16", "fp32")),
    ("replay", "the same buffers again, with other values and adapter ids", ("bf16", "fp32")),
    ("resized", "fewer tokens, then more again, with the same weight", ("bf16",)),
    ("repeat", "a repeated call gives the same bits", ("bf16", "fp32")),
    ("kept", "a later call does not write over an earlier result", ("bf16",)),
    ("unmodified", "no operand is written to", ("bf16",)),
    ("written", "every output is written, on poisoned memory", ("bf16", "fp32")),
)


def behaviour_cases() -> Iterator[Case]:
    """Yield the cases of behaviour: each names the procedure that asks it."""
    for procedure, exercises, shorts in PROCEDURES:
        for short in shorts:
            yield Case(
                f"int4_lora_linear/{procedure}/{short}",
                exercises,
                "int4_lora_linear",
                with_adapters(FLOATS[short], bias=FLOATS[short]),
                procedure=procedure,
                quick=short == "bf16",
            )
    for short in ("bf16", "fp16", "fp32"):
        yield Case(
            f"int4_lora_linear/bias_of_errors/{short}",
            "over many draws, errors have no systematic part",
            "int4_lora_linear",
            with_adapters(FLOATS[short], count=64, columns=64, groups=2, rank=4),
            procedure="many_draws",
            quick=short != "fp16",
        )
    yield Case(
        "int4_linear/repeat/bf16",
        "a repeated call gives the same bits with long sums",
        "int4_linear",
        _long,
        procedure="repeat",
    )
    yield Case(
        "int4_lora_linear/large_output/bf16",
        "an output of more than 2^31 bytes",
        "int4_lora_linear",
        _large_output,
        optional=True,
    )
    yield Case(
        "int4_linear/large_weight/bf16",
        "packed words of more than 2^31 bytes",
        "int4_linear",
        _large_weight,
        optional=True,
    )


def _long(draws: Draws) -> Operands:
    x = draws.normal("x", (8, 4096)).to(torch.bfloat16)
    return Operands(x=x, weight=weight(draws, 64, 4096, groups=32))


LARGE_TOKENS = 2**16 + 256


def _large_output(draws: Draws) -> Operands:
    """Make 65,792 tokens of 32 columns with 16,384 outputs: 2^31 + 2^23 bytes of bfloat16."""
    x = draws.normal("x", (256, 32)).to(torch.bfloat16).repeat(LARGE_TOKENS // 256, 1)
    return Operands(
        x=x,
        weight=weight(draws, 2**14, 32, groups=1),
        lora=adapters(draws, 2**14, 32, rank=4),
        adapter_ids=torch.arange(LARGE_TOKENS) % 4 - 1,
    )


def _large_weight(draws: Draws) -> Operands:
    """Make a weight of 2^17 + 256 rows and 2^15 columns, whose rows repeat after 256."""
    few = weight(draws, 256, 2**15, groups=2**8)
    return Operands(
        x=draws.normal("x", (1, 2**15)).to(torch.bfloat16),
        weight=few.rows(torch.arange(256).repeat(2**9 + 1)),
    )
