"""The times of vLLM's kernel and ours, and what a layer does that was chosen by them."""

import dataclasses

import pytest
import torch

from int4_lora.compiled.selection.timing import Times
from int4_lora.integration.vllm_plugin import stock_trial
from int4_lora.integration.vllm_plugin.base_choice import (
    BASES,
    SHARED_BASE,
    VLLM,
    Choice,
    Plan,
)
from int4_lora.integration.vllm_plugin.load_check import fault_of_layer
from int4_lora.integration.vllm_plugin.stock_layout import shared_weight
from int4_lora.integration.vllm_plugin.stock_trial import choice_of
from int4_lora.reference import dequantize

CPU = torch.device("cpu")
KIND = stock_trial.Kind((64,), 128, 128, 32, True, torch.bfloat16, torch.bfloat16)
MANY = 25  # tokens, from which ours computes on vLLM's layout in these tests
MIXED = Choice(Plan(VLLM, ours_from=MANY), "measured", "1.20 x")


@pytest.fixture
def trials(monkeypatch, tmp_path):
    """Let times come from a table and be kept in an empty folder; return what is asked, and it."""
    asked = []

    class Trial:
        steady = True

        def __init__(self, kind, device):
            pass

        def seconds(self, names, tokens):
            asked.extend((name, tokens) for name in names)
            fast = tokens > 32  # ours
            times = {BASES[0]: 1.0, BASES[1]: 2.0 if fast else 0.5, SHARED_BASE: 1.0}
            return {name: times[name] for name in names}, Trial.steady

    monkeypatch.setenv("INT4_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(stock_trial, "_Trial", Trial)
    return asked, Trial


def test_times_are_kept_for_later_starts_whatever_is_favoured(trials):
    asked, _ = trials
    first = choice_of(KIND, CPU)
    assert first.plan == Plan(VLLM, ours_from=33)
    assert (BASES[0], 512) in asked
    asked.clear()
    assert choice_of(KIND, CPU) == first
    assert choice_of(KIND, CPU, "decode").plan == first.plan
    assert choice_of(KIND, CPU, "prefill", may_share=False).plan == Plan()
    assert asked == []
    choice_of(dataclasses.replace(KIND, inputs=256), CPU)
    assert asked


def test_times_of_a_busy_machine_are_not_kept(trials):
    asked, trial = trials
    trial.steady = False
    choice_of(KIND, CPU)
    asked.clear()
    choice_of(KIND, CPU)
    assert (BASES[1], 1) in asked


@pytest.mark.parametrize(
    ("ours", "quiet"),
    [
        ([1.0], [True]),
        ([2.0, 1.0], [True, True]),  # ours is within the margin at the second try
        ([2.0, 2.0, 2.0], [True, True, True]),
        ([0.5, 0.6], [False, True]),
        ([0.5, 0.6, 0.7], [False, False, False]),
    ],
)
def test_a_time_is_tried_again_while_it_may_be_wrong(ours, quiet, monkeypatch):
    given = iter(zip(ours, quiet, strict=True))

    def measure(callables, **_):
        seconds, steady = next(given)
        noise = [0.0] * 4 if steady else [0.0, 0.0, 9.0, 9.0]
        return {
            name: Times([(seconds if name == BASES[0] else 1.0) + more for more in noise])
            for name in callables
        }

    monkeypatch.setattr(stock_trial, "measure", measure)
    monkeypatch.setattr(stock_trial._Trial, "_callable", lambda *_: len)
    seconds, steady = stock_trial._Trial(KIND, CPU).seconds(BASES, 1)
    assert seconds == {BASES[0]: min(ours), BASES[1]: 1.0}
    assert steady == quiet[-1]
    assert next(given, None) is None


@pytest.mark.parametrize(
    "content", [[], {"1": 3}, {"1": {BASES[0]: "fast"}}, {"1": {BASES[0]: -1.0}}]
)
def test_a_file_that_holds_no_times_is_measured_again(content, trials, monkeypatch):
    asked, _ = trials
    monkeypatch.setattr(stock_trial, "recall", lambda *_: content)
    assert choice_of(KIND, CPU).plan == Plan(VLLM, ours_from=33)
    assert (BASES[0], 1) in asked


def test_ours_failing_is_a_reason(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(stock_trial, "choose", fail)
    choice = choice_of(KIND, CPU)
    assert choice.plan == Plan(VLLM)
    assert choice.reason == "ours does not run: RuntimeError: no compiler"


def test_a_default_device_does_not_matter(one_rank, monkeypatch):
    """VLLM builds a model while the GPU is torch's default device; here another stands for it."""
    monkeypatch.setattr(stock_trial, "recall", lambda *_: None)
    monkeypatch.setattr(stock_trial, "BUDGET", 0.01)
    kind = dataclasses.replace(KIND, slots=2, rank=8)
    times = stock_trial._KeptTimes(kind, CPU, may_share=True)
    names = (*BASES, stock_trial.LAYER, stock_trial.ADAPTERS)
    with torch.device("meta"):
        few, many = times(names, 4), times((SHARED_BASE,), MANY)
    assert set(few) == set(names)
    assert set(many) == {SHARED_BASE}


@pytest.mark.parametrize("wrong", [True, False])
def test_vllms_adapters_are_left_out_where_they_change_base_rows(one_rank, monkeypatch, wrong):
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from int4_lora.integration.vllm_plugin.vocabulary import adds_to_rows_without_an_adapter

    for name in ("add_lora_embedding", "add_lora_logits"):
        monkeypatch.setattr(PunicaWrapperCPU, name, lambda *_, **__: None)
    written = slice(None) if wrong else slice(1)
    monkeypatch.setattr(
        PunicaWrapperCPU, "add_lora_linear", lambda self, y, *_, **__: y[written].fill_(1)
    )
    given = []
    monkeypatch.setattr(
        stock_trial, "choose", lambda *_, stock_adapters, **__: given.append(stock_adapters)
    )
    monkeypatch.setattr(stock_trial._KeptTimes, "keep", lambda self: None)
    adds_to_rows_without_an_adapter.cache_clear()
    try:
        choice_of(dataclasses.replace(KIND, slots=2, rank=8), CPU)
    finally:
        adds_to_rows_without_an_adapter.cache_clear()
    assert given == [not wrong]


def test_vllms_adapters_are_measured(one_rank, monkeypatch):
    """Whether they are right does not matter for their time."""
    from types import SimpleNamespace

    monkeypatch.setattr(stock_trial, "BUDGET", 0.01)
    config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=2))
    monkeypatch.setattr(stock_trial, "get_current_vllm_config", lambda: config)
    trial = stock_trial._Trial(dataclasses.replace(KIND, slots=2, rank=8, outputs=(64, 32)), CPU)
    seconds, _ = trial.seconds((stock_trial.STOCK_ADAPTERS,), 4)
    assert seconds[stock_trial.STOCK_ADAPTERS] > 0


KINDS = {
    "symmetric": KIND,
    "asymmetric": dataclasses.replace(KIND, symmetric=False, outputs=(64, 96)),
    "channel": dataclasses.replace(KIND, group_size=-1),
    "float16": dataclasses.replace(KIND, dtype=torch.float16, scale_dtype=torch.float16),
}


def stock_layer_of(kind, seed=0):
    weight = stock_trial._random_weight(kind, CPU, seed)
    weight.scale.uniform_(0.005, 0.02)
    return weight, stock_trial._stock_layer(kind, weight)[1]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_our_code_reads_vllms_layout(kind, one_rank):
    weight, layer = stock_layer_of(kind)
    shared = shared_weight(layer, weight)
    assert shared is not None
    assert shared.words.data_ptr() == layer.weight_packed.data_ptr()  # one copy
    rows = shared.rows(16, 64, torch.float32)
    assert torch.equal(rows, dequantize(weight)[16:64].float())
    assert fault_of_layer(weight, shared, kind.dtype, MANY) is None


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_another_layout_is_not_shared(name, one_rank):
    weight, layer = stock_layer_of(KINDS["asymmetric"])
    tensor = getattr(layer, name).data
    tensor.copy_(tensor.flip(0))
    assert shared_weight(layer, weight) is None
    getattr(layer, name).data = tensor.T.contiguous()
    assert shared_weight(layer, weight) is None


def served_layer_of(kind, choice, monkeypatch, **options):
    """Return a layer of vLLM's with our scheme, loaded with a random weight, and the weight."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from int4_lora.integration.vllm_plugin import scheme
    from int4_lora.integration.vllm_plugin.config import Int4LoRAConfig
    from int4_lora.integration.vllm_plugin.options import Options
    from int4_lora.integration.vllm_plugin.served_engine import ServedEngine
    from support.engines import CONFIG

    monkeypatch.setattr(scheme, "choice_of", lambda *_, **__: choice)
    config = Int4LoRAConfig.from_config(CONFIG)
    config._engine = ServedEngine(Options(**options), dtype=kind.dtype, max_tokens=64)
    layer = ReplicatedLinear(
        kind.inputs,
        sum(kind.outputs),
        bias=False,
        params_dtype=kind.dtype,
        quant_config=config,
        prefix="model.a_proj",
    )
    weight = stock_trial._random_weight(kind, CPU, 0)
    weight.scale.uniform_(0.005, 0.02)
    layer.weight_packed.data.copy_(weight.packed)
    layer.weight_scale.data.copy_(weight.scale)
    layer.scheme.process_weights_after_loading(layer)
    return layer, weight


SERVED = dataclasses.replace(KIND, inputs=256, all_inputs=256, group_size=128)


def test_a_layer_runs_vllms_kernel_for_few_tokens_and_ours_for_many(one_rank, monkeypatch):
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

    layer, weight = served_layer_of(SERVED, MIXED, monkeypatch)
    served, calls = layer.int4_lora, []
    stock = CPUWNA16LinearKernel.apply_weights

    def count(kernel, layer, x, bias=None):
        calls.append(len(x))
        return stock(kernel, layer, x, bias)

    monkeypatch.setattr(CPUWNA16LinearKernel, "apply_weights", count)
    for tokens in (1, MANY - 1, MANY, 60):
        x = torch.randn(tokens, SERVED.inputs).bfloat16()
        y = layer(x)[0]
        right = x.double() @ dequantize(weight).double().T
        torch.testing.assert_close(y.double(), right, rtol=0.02, atol=0.02)
    assert calls == [1, MANY - 1]
    assert served.weight is None
    assert served.shared.words.data_ptr() == layer.weight_packed.data_ptr()
    assert torch.equal(served.shared.packed_weight().packed, weight.packed)
    assert served.engine.summary() == [
        "0 of 1 linear layers fused (INT4 base, adapters); 1 on vLLM's base kernel: 1 measured",
        "1 x a_proj (64 x 256): base by vLLM up to 24 tokens and by int4_lora above, from one "
        "copy: 1.20 x",
    ]


def test_a_layer_whose_weight_cannot_be_shared_runs_vllms_kernel(one_rank, monkeypatch):
    from int4_lora.integration.vllm_plugin import scheme

    monkeypatch.setattr(scheme, "shared_weight", lambda *_: None)
    layer, _ = served_layer_of(SERVED, MIXED, monkeypatch)
    served = layer.int4_lora
    assert served.shared is None
    assert layer(torch.randn(60, SERVED.inputs).bfloat16())[0].isfinite().all()
    assert len(served.engine.summary()) == 1  # the plan is not claimed


def test_a_reloaded_weight_is_read_where_the_first_was(one_rank, monkeypatch):
    """Captured graphs go on reading the first tensors."""
    layer, _ = served_layer_of(SERVED, MIXED, monkeypatch)
    served = layer.int4_lora
    first = served.shared
    other, stock = stock_layer_of(SERVED, seed=1)
    served.share(shared_weight(stock, other), served._stock_base)
    assert served.shared is first
    assert torch.equal(first.packed_weight().packed, other.packed)


def test_vllms_layer_is_where_the_weight_is(one_rank, monkeypatch):
    """After loading, when scales of another dtype are tried, the CPU is the default device."""
    placed = []

    def stop(scheme, layer):
        placed.extend(parameter.device.type for parameter in layer.parameters())
        raise RuntimeError("far enough")

    monkeypatch.setattr(stock_trial.CompressedTensorsWNA16, "process_weights_after_loading", stop)
    monkeypatch.setattr(stock_trial, "prepare", lambda weight: weight)
    times = stock_trial._KeptTimes(KIND, torch.device("meta"), may_share=True)
    with pytest.raises(RuntimeError, match="far enough"):
        times(BASES, 1)
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

    choice = Choice(Plan(VLLM), "measured", "1.20 x")
    monkeypatch.setattr(scheme, "choice_of", lambda *_, **__: choice)
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
