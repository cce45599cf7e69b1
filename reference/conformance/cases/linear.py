"""Cases of ``int4_linear``: every format in a product, and numbers that expose roundings.

Source: ``docs/numerics.md``; TOSA's sets of dot products (zeros, large exponents, cancellation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from int4_lora.reference import PackedWeight, pack
from int4_lora.reference.conformance.cases.case import Case
from int4_lora.reference.conformance.cases.draws import Draws
from int4_lora.reference.conformance.cases.format import FLOATS, WEIGHTS, special, spread, strided
from int4_lora.reference.conformance.cases.operands import Operands, tokens, weight

__all__ = ["linear_cases"]

Make = Callable[[Draws], Operands]


def linear_cases() -> Iterator[Case]:
    """Yield the cases of ``int4_linear``."""
    for name, (exercises, arguments, quick) in WEIGHTS.items():
        for short, dtype in FLOATS.items():
            yield Case(
                f"int4_linear/{name}/{short}",
                f"a product with {exercises}",
                "int4_linear",
                _layer(dtype, **arguments),
                quick=quick and short == "bf16",
            )
    for of_scale, of_x in (("fp32", "bf16"), ("fp16", "bf16"), ("bf16", "fp16"), ("bf16", "fp32")):
        yield Case(
            f"int4_linear/scale_{of_scale}/{of_x}",
            "scales of another dtype than x: the weight is rounded to theirs, not to that of x",
            "int4_linear",
            _layer(FLOATS[of_x], scale_dtype=FLOATS[of_scale]),
            quick=of_scale == "fp32",
        )
    yield Case(
        "int4_linear/group_128/fp64",
        "float64 activations, summed in float64",
        "int4_linear",
        _layer(torch.float64, scale_dtype=torch.float32, groups=2),
    )
    yield from _shapes()
    yield from _biases()
    for short, dtype in FLOATS.items():
        yield from _numbers(short, dtype)
        yield from _sizes(short, dtype)
    yield from _limits()


def _limits() -> Iterator[Case]:
    yield Case(
        "int4_linear/overflow/fp16",
        "results beyond float16 are infinite with their sign; those within are not",
        "int4_linear",
        _overflowing,
        quick=True,
    )
    for columns in (32, 64, 128):
        yield Case(
            f"int4_linear/short_sum_{columns}/fp32",
            f"a sum of {columns} float32 products, in which 16-bit sums show",
            "int4_linear",
            _layer(torch.float32, columns=columns, groups=columns // 32),
            quick=columns == 64,
        )
    for short in ("fp16", "bf16"):
        yield Case(
            f"int4_linear/subnormal_x/{short}",
            "activations that are subnormal, or as small as their dtype allows",
            "int4_linear",
            _scaled(FLOATS[short], 2.0**-20 if short == "fp16" else 2.0**-124),
        )


def _shapes() -> Iterator[Case]:
    for count in (0, 1, 2, 7, 17, 33, 257):
        yield Case(
            f"int4_linear/tokens_{count}/bf16",
            f"{count} tokens at once",
            "int4_linear",
            _layer(torch.bfloat16, count=count),
            quick=count in (0, 1),
        )
    for rows, columns in ((72, 256), (1, 256), (200, 384)):
        yield Case(
            f"int4_linear/outputs_{rows}/bf16",
            f"{rows} outputs: no multiple of 64",
            "int4_linear",
            _layer(torch.bfloat16, rows=rows, columns=columns, groups=columns // 128),
        )
    yield Case(
        "int4_linear/many_outputs/bf16",
        "4096 outputs: one wrong row among them counts",
        "int4_linear",
        _layer(torch.bfloat16, count=4, rows=4096, columns=128, groups=1),
    )
    yield Case(
        "int4_linear/many_tokens/bf16",
        "4096 tokens: one wrong row among them counts",
        "int4_linear",
        _layer(torch.bfloat16, count=4096),
    )
    yield Case(
        "int4_linear/non_contiguous/bf16",
        "operands that are views with strides",
        "int4_linear",
        lambda draws: Operands(x=spread(tokens(draws)), weight=strided(weight(draws))),
        quick=True,
    )


def _biases() -> Iterator[Case]:
    for short, of_bias in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
        yield Case(
            f"int4_linear/bias_{of_bias}/{short}",
            "a bias, which is added before the last rounding",
            "int4_linear",
            _layer(FLOATS[short], bias=FLOATS[of_bias]),
            quick=(short, of_bias) == ("bf16", "bf16"),
        )


def _numbers(short: str, dtype: torch.dtype) -> Iterator[Case]:
    def case(name: str, exercises: str, make: Make, **flags: Any) -> Case:
        return _case(f"{name}/{short}", exercises, make, **flags)

    yield case(
        "one_hot",
        "each token picks one column of the weight: the result is the weight itself",
        lambda draws: Operands(
            x=torch.eye(256, dtype=dtype)[draws.permutation("columns", 256)[:96]],
            weight=weight(draws, groups=4, symmetric=False, dtype=dtype),
        ),
        equal=True,
        quick=True,
    )
    yield case(
        "exact",
        "powers of two and small integers: no rounding but the last, in any order",
        lambda draws: _exact(draws, dtype),
        equal=True,
        quick=True,
    )
    yield case(
        "cancellation",
        "sums whose terms cancel nearly all of one another",
        lambda draws: _cancelling(draws, dtype),
        quick=True,
    )


def _case(name: str, exercises: str, make: Make, **flags: Any) -> Case:
    return Case(f"int4_linear/{name}", exercises, "int4_linear", make, **flags)


def _sizes(short: str, dtype: torch.dtype) -> Iterator[Case]:
    yield _case(
        f"special_scales/{short}",
        "scales that are zero, negative, subnormal, infinite and NaN reach their own outputs only",
        lambda draws: Operands(
            x=tokens(draws, dtype=dtype), weight=special(weight(draws, dtype=dtype))
        ),
    )
    yield _case(
        f"special_x/{short}",
        "a NaN and an infinity reach their own tokens only",
        lambda draws: _special_tokens(draws, dtype),
    )
    yield _case(
        f"large_sum/{short}",
        "a sum of 8192 products",
        _layer(dtype, count=4, rows=16, columns=8192, groups=64),
    )
    yield _case(f"large_x/{short}", "activations of large magnitude", _scaled(dtype, LARGE[dtype]))


LARGE = {torch.float16: 900.0, torch.bfloat16: 2.0**60, torch.float32: 2.0**80}


def _layer(
    dtype: torch.dtype,
    *,
    count: int = 16,
    rows: int = 64,
    columns: int = 256,
    bias: torch.dtype | None = None,
    scale_dtype: torch.dtype | None = None,
    **arguments: Any,
) -> Make:
    def make(draws: Draws) -> Operands:
        of_scale = scale_dtype or dtype
        return Operands(
            x=tokens(draws, count, columns, dtype),
            weight=weight(draws, rows, columns, dtype=of_scale, **arguments),
            bias=None if bias is None else draws.normal("bias", (rows,)).to(bias),
        )

    return make


def _scaled(dtype: torch.dtype, factor: float) -> Make:
    return lambda draws: Operands(
        x=(draws.normal("x", (16, 256)) * factor).to(dtype), weight=weight(draws, dtype=dtype)
    )


def _exact(draws: Draws, dtype: torch.dtype) -> Operands:
    random = weight(draws, 64, 128, groups=4, symmetric=False, dtype=dtype)
    powers = draws.integers("powers", (64, 4), -3, 0).to(torch.float64)
    x = draws.integers("x", (16, 128), -1, 1).to(dtype)
    return Operands(x=x, weight=replace(random, scale=(2.0**powers).to(dtype)))


def _cancelling(draws: Draws, dtype: torch.dtype) -> Operands:
    codes = draws.integers("codes", (64, 128), -8, 7).repeat_interleave(2, dim=1)
    codes[:, ::16] = draws.integers("others", (64, 16), -8, 7)
    scale = ((draws.uniform("scale", (64, 2)) + 0.2) * 0.05).to(dtype)
    x = draws.normal("x", (16, 128)).to(dtype).repeat_interleave(2, dim=1)
    x[:, 1::2] *= -1
    return Operands(x=x, weight=PackedWeight(pack(codes.to(torch.int8)), scale, shape=(64, 256)))


def _overflowing(draws: Draws) -> Operands:
    random = weight(draws, dtype=torch.float16)
    scale = random.scale.clone()
    scale[::3] = scale[::3] * 400
    x = draws.normal("x", (16, 256)) * 20
    return Operands(x=x.to(torch.float16), weight=replace(random, scale=scale))


def _special_tokens(draws: Draws, dtype: torch.dtype) -> Operands:
    x: Tensor = tokens(draws, dtype=dtype)
    x[3, 17] = float("nan")
    x[5, 100] = float("inf")
    return Operands(x=x, weight=weight(draws, dtype=dtype))
