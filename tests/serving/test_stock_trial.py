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


KIND = stock_trial.Kind((64,), 128, 128, 32, True, torch.bfloat16, torch.bfloat16)


def test_a_default_device_does_not_matter(one_rank, monkeypatch):
    """VLLM builds a model while the GPU is torch's default device; here another stands for it."""
    monkeypatch.setattr(stock_trial, "recall", lambda *_: None)
    monkeypatch.setattr(stock_trial, "remember", lambda *_: None)
    monkeypatch.setattr(stock_trial, "TOKENS", (1, 4))
    monkeypatch.setattr(stock_trial, "BUDGET", 0.01)
    with torch.device("meta"):
        ratios = stock_trial._ratios(KIND, torch.device("cpu"))
    assert set(ratios) == {"1", "4"}


def test_vllms_layer_is_where_the_weight_is(one_rank, monkeypatch):
    """After loading, when scales of another dtype are tried, the CPU is the default device."""
    placed = []

    def stop(scheme, layer):
        placed.extend(parameter.device.type for parameter in layer.parameters())
        raise RuntimeError("far enough")

    monkeypatch.setattr(stock_trial.CompressedTensorsWNA16, "process_weights_after_loading", stop)
    monkeypatch.setattr(stock_trial, "prepare", lambda weight: weight)
    with pytest.raises(RuntimeError, match="far enough"):
        stock_trial._measured(KIND, torch.device("meta"))
    assert set(placed) == {"meta"}


@pytest.fixture
def amx(monkeypatch):
    """Let vLLM's kernel believe that the CPU has AMX; it lays nothing out."""
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    monkeypatch.delenv("VLLM_CPU_INT4_W4A8", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for name in ("_process_gptq_weights_w4a8", "_process_gptq_weights_w4a16"):
        monkeypatch.setattr(CPUWNA16LinearKernel, name, lambda *_: None)


def test_vllms_kernel_is_measured_with_16_bit_activations(one_rank, amx):
    from vllm import envs

    from int4_lora.integration.vllm_plugin.stock_arithmetic import quantises_activations

    weight = stock_trial._random_weight(KIND, torch.device("cpu"), 0)
    scheme, layer = stock_trial._stock_layer(KIND, weight)
    assert not quantises_activations(layer)
    assert envs.VLLM_CPU_INT4_W4A8  # as before
    scheme.process_weights_after_loading(layer)
    assert quantises_activations(layer)


@pytest.mark.parametrize(
    ("backend", "variable", "quantised"),
    [
        ("auto", None, False),
        ("auto", "1", True),
        ("auto", "0", False),
        ("stock-base", None, True),
        ("stock-base", "0", False),
    ],
)
def test_activations_are_quantised_only_as_the_operator_asks(
    backend, variable, quantised, one_rank, amx, monkeypatch
):
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from int4_lora.integration.vllm_plugin import scheme
    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig
    from int4_lora.integration.vllm_plugin.options import Options
    from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
    from support.engines import CONFIG

    monkeypatch.setattr(scheme, "stock_reason", lambda *_: "measured")
    if variable is not None:
        monkeypatch.setenv("VLLM_CPU_INT4_W4A8", variable)
    config = Int4LoRAConfig.from_config(CONFIG)
    engine = config._engine = ServedEngine(Options(backend=backend))
    layer = ReplicatedLinear(
        256, 128, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix="a"
    )
    layer.scheme.process_weights_after_loading(layer)
    assert layer.int4_lora.activations_quantised == quantised
    log = "".join(engine.summary())
    assert ("VLLM_CPU_INT4_W4A8=0 turns that off" in log) == quantised
    assert ("here they have 16 bits" in log) == (not quantised and variable != "0")
