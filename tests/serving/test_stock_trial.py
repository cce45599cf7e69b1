"""The choice between vLLM's kernel and ours from measured ratios."""

import pytest
import torch

from int4_lora.integration.vllm_plugin import stock_trial
from int4_lora.integration.vllm_plugin.stock_trial import TOKENS, stock_reason

FAST_DECODE = (0.4, 0.5, 0.7, 0.8, 0.9, 1.2, 1.1, 1.0)  # ours over vLLM's, from 1 to 256 tokens


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        (FAST_DECODE, None),
        ((1.05,) * 8, None),
        ((1.06,) * 8, "measured 1.06 x faster on average of 1 to 256 tokens"),
        ((0.9, *[1.2] * 7), "measured 1.16 x faster on average of 1 to 256 tokens"),
        ((*FAST_DECODE[:-1], 1.6), "measured 1.60 x faster at 256 tokens"),
    ],
)
def test_one_slow_number_of_tokens_does_not_decide_unless_it_is_very_slow(
    ratios, reason, monkeypatch
):
    by_tokens = dict(zip(map(str, TOKENS), ratios, strict=True))
    monkeypatch.setattr(stock_trial, "_ratios", lambda kind, device: by_tokens)
    assert stock_reason(None, torch.device("cpu")) == reason


def test_ours_failing_is_a_reason(monkeypatch):
    def fail(kind, device):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(stock_trial, "_ratios", fail)
    assert stock_reason(None, torch.device("cpu")) == "ours does not run: RuntimeError: no compiler"
