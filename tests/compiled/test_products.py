"""The dtype in which x and a dense weight are multiplied, on each kind of CPU."""

import pytest
import torch

from int4_lora.compiled import products
from int4_lora.compiled.products import factor_dtype

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("dtype", "scales", "slow", "factors"),
    [
        (BRAIN, BRAIN, (), BRAIN),
        (BRAIN, BRAIN, (BRAIN,), SINGLE),
        (BRAIN, HALF, (), SINGLE),
        (HALF, HALF, (BRAIN,), HALF),
        (SINGLE, BRAIN, (), SINGLE),
        (DOUBLE, BRAIN, (), DOUBLE),
    ],
)
def test_factors_keep_a_dtype_that_is_fast(dtype, scales, slow, factors, monkeypatch):
    monkeypatch.setattr(products, "SLOW_ON_CPU", slow)
    assert factor_dtype(torch.empty(1, dtype=dtype), scales) == factors


@pytest.mark.parametrize(
    ("machine", "answers", "emulates"),
    [
        ("x86_64", (False, False), True),
        ("AMD64", (False, False), True),
        ("x86_64", (True, False), False),
        ("x86_64", (False, True), False),
        ("x86_64", (False, None), False),  # a torch that cannot tell
        ("aarch64", (False, False), False),
    ],
)
def test_which_cpus_emulate_bfloat16(machine, answers, emulates, monkeypatch):
    monkeypatch.setattr(products.platform, "machine", lambda: machine)
    for name, answer in zip(products.BFLOAT16_ON_X86, answers, strict=True):
        test = None if answer is None else lambda answer=answer: answer
        monkeypatch.setattr(torch.cpu, name, test, raising=False)
    assert products._emulates_bfloat16() == emulates
    assert (BRAIN in products._slow_on_cpu()) >= emulates
