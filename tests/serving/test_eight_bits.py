"""Weights of 8 bits, which vLLM has no kernel for on a CPU, with adapters."""

import pytest
import torch

from int4_lora.compiled.layouts.int8 import Int8Weight
from support.engines import COLD, engine, layers_of, logprobs, requests_of
from support.served_truth import truth_and_allowed
from support.tiny import VARIANTS, make_tiny

OTHERS = {"w8-channel": {"strategy": "channel", "num_bits": 8}}
OTHERS["w8-asym-channel"] = {**OTHERS["w8-channel"], "symmetric": False}


@pytest.mark.versions
@pytest.mark.parametrize(
    "variant",
    [
        "w8-g128",
        pytest.param("w8-channel", marks=pytest.mark.nightly),
        pytest.param("w8-asym-channel", marks=pytest.mark.nightly),
    ],
)
def test_they_are_served_right(variant, tiny_models, tiny_adapters, prompts, tmp_path, monkeypatch):
    for name, weights in OTHERS.items():
        monkeypatch.setitem(VARIANTS, name, weights)
    model = tiny_models[variant] if variant not in OTHERS else make_tiny(tmp_path / "m", variant)
    truth, allowed = truth_and_allowed(model, list(tiny_adapters.values()), prompts)
    assert (truth[1] - truth[0]).abs().amax() > 5 * allowed
    requests, rows = [None, *requests_of(tiny_adapters).values()], [0, 1, 2, 3]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **COLD) as llm:
        answers = logprobs(llm, prompts, [requests[row] for row in rows])
        served = [
            layer.int4_lora for layer in layers_of(llm).values() if hasattr(layer, "int4_lora")
        ]
    assert any(isinstance(layer.weight, Int8Weight) for layer in served)
    right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
    assert (torch.tensor(answers, dtype=torch.float64) - right).abs().amax() <= allowed


def test_vllm_has_no_kernel_for_them(tiny_models):
    """Without the flag, vLLM's own sentence stands; with the option stock-base, ours."""
    stock_base = {"int4_lora": {"backend": "stock-base", "warm_up": False}}
    for settings, sentence in (
        ({}, "Failed to find a kernel"),
        ({**COLD, "additional_config": stock_base}, "no kernel for its bits, its shape or its"),
    ):
        with pytest.raises(Exception) as caught, engine(tiny_models["w8-g128"], **settings):  # noqa: PT011
            pass
        assert sentence in str(caught.value)
