"""INT4 experts, which stock vLLM does not compute on a CPU without AMX, alone and with adapters."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from int4_lora.integration import fit_adapter, open_checkpoint, read_adapter, write_adapter
from int4_lora.integration.vllm_plugin.served_experts import ServedExperts
from support.checkpoints import edit_config
from support.engines import (
    COLD,
    FLAG,
    engine,
    layers_of,
    logprobs,
    next_logprobs,
    requests_of,
    run_in_process,
)
from support.tiny_moe import (
    ADAPTERS,
    make_moe_adapter,
    make_tiny_moe,
    moe_truth,
    write_dense_twin,
)


def experts_of(llm):
    """Return the plug-in's state of every layer of experts."""
    found = [getattr(layer, "int4_lora", None) for layer in layers_of(llm).values()]
    return list({id(one): one for one in found if isinstance(one, ServedExperts)}.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a call that makes a model and its dense twin, once."""
    root, cache = tmp_path_factory.mktemp("moe"), {}

    def make(variant="g128", family="qwen3"):
        key = f"{family}-{variant}"
        if key not in cache:
            model = make_tiny_moe(root / key, variant, family)
            cache[key] = model, write_dense_twin(model, root / f"{key}-dense")
        return cache[key]

    return make


def assert_served(llm, truth, rows, requests=(None,)):
    """Check the log-probabilities of the truth's prompts, each with the request of its row."""
    answers = logprobs(llm, truth.prompts, [requests[row] for row in rows])
    right = torch.stack([truth.logprobs[row, number] for number, row in enumerate(rows)])
    error = (torch.tensor(answers, dtype=torch.float64) - right).abs().amax()
    assert error <= truth.allowed, f"rows {rows}: {error:.4f} of {truth.allowed:.4f} nats"


@pytest.mark.parametrize(
    "variant",
    [
        "g128",
        pytest.param("asym-g32", marks=pytest.mark.nightly),
        pytest.param("g64", marks=pytest.mark.nightly),
        pytest.param("channel", marks=pytest.mark.nightly),
        pytest.param("asym-channel", marks=pytest.mark.nightly),
        pytest.param("w8-g128", marks=pytest.mark.nightly),
    ],
)
def test_experts_alone(variant, made):
    model, dense = made(variant)
    truth = moe_truth(dense)
    with engine(model, **COLD) as llm:
        assert_served(llm, truth, [0, 0, 0, 0])
        served = experts_of(llm)
    assert [experts.weight is not None for experts in served] == [True, True]


LORA = {
    "enable_lora": True,
    "max_loras": 3,
    "max_lora_rank": 8,
    "enable_mixed_moe_lora_format": True,
}


def expert_requests(folders):
    """Return vLLM's request for each adapter; those of experts are in PEFT's form."""
    requests = requests_of(folders)
    for name, request in requests.items():
        request.is_3d_lora_weight = name != "attention"
    return requests


@pytest.fixture(scope="module")
def adapters(made, tmp_path_factory):
    """Return the folders of adapters on attention, on experts and on both, for Qwen3-MoE."""
    root, (_, dense) = tmp_path_factory.mktemp("moe-adapters"), made()
    return {
        name: make_moe_adapter(root / name, dense, name, settings)
        for name, settings in ADAPTERS.items()
    }


@pytest.fixture(scope="module")
def adapted_truth(made, adapters):
    """Return the truth of Qwen3-MoE and its adapters, none of which is without effect."""
    truth = moe_truth(made()[1], list(adapters.values()))
    effects = (truth.logprobs[1:] - truth.logprobs[:1]).abs().amax((1, 2))
    assert (effects > 5 * truth.allowed).all()
    return truth


@pytest.mark.versions
def test_adapters_on_attention_on_experts_and_on_both(made, adapters, adapted_truth):
    requests = [None, *expert_requests(adapters).values()]
    with engine(made()[0], **LORA, **COLD) as llm:
        for rows in ([0, 0, 0, 0], [2, 2, 2, 2], [0, 1, 2, 3], [3, 2, 1, 0]):
            assert_served(llm, adapted_truth, rows, requests)
        served = experts_of(llm)
    assert [experts.weight is not None for experts in served] == [True, True]
    assert [experts.lora_fallback_reason for experts in served] == [None, None]
    assert served[0].engine.summary()[1] == "2 of 2 layers of experts by int4_lora (INT4, adapters)"


@pytest.mark.nightly
def test_a_request_is_answered_as_it_is_alone(made, adapters, adapted_truth):
    requests = [None, *expert_requests(adapters).values()]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    given = [(adapted_truth.prompts[number % 4], requests[number // 4]) for number in order]
    settings = {**LORA, "max_loras": 2, "max_cpu_loras": 4}  # fewer slots than adapters
    with engine(made()[0], **settings, **COLD) as llm:
        together = next_logprobs(llm, *zip(*given, strict=True))
        alone = [next_logprobs(llm, [prompt], [request])[0] for prompt, request in given]
    difference = (torch.tensor(together) - torch.tensor(alone)).abs().amax()
    assert difference <= 0.1  # nats: rounded to bfloat16 in another order


@pytest.fixture(scope="module")
def separate(adapters, tmp_path_factory):
    """Return the adapter of experts with a pair for each projection of each expert."""
    folder = tmp_path_factory.mktemp("separate") / "experts"
    write_adapter(folder, read_adapter(adapters["experts"]).modules, experts="separate")
    return folder


@pytest.mark.nightly
def test_pairs_of_single_experts(made, separate, adapters, adapted_truth):
    folders = {"attention": adapters["attention"], "separate": separate}
    requests = [None, *requests_of(folders).values()]
    with engine(made()[0], enable_lora=True, max_loras=2, max_lora_rank=8, **COLD) as llm:
        assert_served(llm, adapted_truth, [2, 1, 0, 2], requests)


@pytest.mark.nightly
def test_mixtral(made, tmp_path):
    """Its adapters get the checkpoint's names, which transformers 5 has not."""
    model, dense = made(family="mixtral")
    folders, fitted = [], {}
    for name, settings in ADAPTERS.items():
        stronger = {**settings, "lora_alpha": 4 * settings["lora_alpha"]}
        folders.append(make_moe_adapter(tmp_path / name, dense, name, stronger))
        fitted[name] = tmp_path / f"{name}-fitted"
        adapter = fit_adapter(read_adapter(folders[-1]), open_checkpoint(model))
        write_adapter(fitted[name], adapter.modules)
    truth = moe_truth(dense, folders)
    effects = (truth.logprobs[1:] - truth.logprobs[:1]).abs().amax((1, 2))
    assert (effects > 5 * truth.allowed).all()
    requests = [None, *requests_of(fitted).values()]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=8, **COLD) as llm:
        for rows in ([0, 1, 2, 3], [3, 2, 1, 0]):
            assert_served(llm, truth, rows, requests)
        assert [experts.weight is not None for experts in experts_of(llm)] == [True, True]


@pytest.mark.nightly
def test_an_adapter_on_the_router(made, tmp_path):
    """Without ours, vLLM 0.32 routes without it, and changes rows that have no adapter."""
    model, dense = made()
    settings = {"r": 4, "lora_alpha": 8, "target_parameters": ["mlp.gate.weight"]}
    folder = make_moe_adapter(tmp_path / "router", dense, "router", settings)
    truth = moe_truth(dense, [folder])
    assert (truth.logprobs[1] - truth.logprobs[0]).abs().amax() > 5 * truth.allowed
    requests = [None, *requests_of({"router": folder}).values()]
    with engine(model, enable_lora=True, max_loras=2, max_lora_rank=8, **COLD) as llm:
        assert_served(llm, truth, [1, 0, 1, 0], requests)


@pytest.mark.nightly
def test_experts_that_take_no_adapters(made, adapters, adapted_truth):
    """With adapters on other modules only, no slots are made for experts."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    requests = [None, *expert_requests({"attention": adapters["attention"]}).values()]
    settings = {**LORA, "lora_target_modules": targets}
    with engine(made()[0], **settings, **COLD) as llm:
        assert_served(llm, adapted_truth, [1, 0, 1, 0], requests)
        assert [experts.slots for experts in experts_of(llm)] == [None, None]


@pytest.mark.nightly
def test_within_the_graph_of_vllm(made, tmp_path):
    model, dense = made()
    truth = moe_truth(dense)
    settings = {**COLD, "enforce_eager": False}
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}  # so that it does compile
    answers, output = run_in_process(tmp_path, model, {}, truth.prompts, settings, **env)
    assert answers is not None, output
    assert "saved AOT compiled function" in output, output
    error = (torch.tensor(answers, dtype=torch.float64) - truth.logprobs[0]).abs().amax()
    assert error <= truth.allowed


@pytest.mark.nightly
def test_two_ranks(made, separate, adapters, adapted_truth, tmp_path):
    """Each expert is split over both."""
    folders = {"attention": adapters["attention"], "separate": separate}
    settings = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, **COLD}
    settings["tensor_parallel_size"] = 2
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    answers, output = run_in_process(
        tmp_path, made()[0], folders, adapted_truth.prompts, settings, **env
    )
    assert answers is not None, output
    assert output.count("2 of 2 layers of experts by int4_lora") == 2
    rows = [0, 1, 2, 0]
    right = torch.stack([adapted_truth.logprobs[row, number] for number, row in enumerate(rows)])
    error = (torch.tensor(answers, dtype=torch.float64) - right).abs().amax()
    assert error <= adapted_truth.allowed


@pytest.fixture
def copied(made, tmp_path):
    """Return a copy of a model that a test may spoil."""
    return shutil.copytree(made()[0], tmp_path / "copied")


def change(model, edit):
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


EXPERT = "model.layers.1.mlp.experts.3"


def cut(tensors):
    name = f"{EXPERT}.up_proj.weight_packed"
    tensors[name] = tensors[name][:-8].contiguous()


def other_scales(tensors):
    name = f"{EXPERT}.down_proj.weight_scale"
    tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda tensors: tensors.pop(f"{EXPERT}.down_proj.weight_scale"),
            f"lacks 1 tensors of the experts of model.layers.1.mlp.experts; the first is {EXPERT}"
            ".down_proj.weight_scale",
        ),
        (cut, f"{EXPERT}.up_proj.weight_packed must be [256, 32] as of all experts of the layer"),
        (other_scales, "must have scales of one dtype, got torch.bfloat16 and torch.float16"),
    ],
    ids=["missing", "cut", "scales"],
)
def test_experts_that_are_spoilt_stop_the_start(edit, sentence, copied):
    change(copied, edit)
    with pytest.raises(Exception) as caught, engine(copied, **COLD):  # noqa: PT011
        pass
    assert sentence in str(caught.value)


def test_experts_of_another_scheme_than_their_fellows(copied):
    def split(_, quantization):
        (group,) = quantization["config_groups"].values()
        weights = {**group["weights"], "group_size": 64}
        down = {**group, "targets": ["re:.*down_proj$"], "weights": weights}
        quantization["config_groups"] = {"group_0": down, "group_1": group}

    edit_config(copied, split)
    with pytest.raises(Exception) as caught, engine(copied, **COLD):  # noqa: PT011
        pass
    assert "must be quantised alike: vLLM holds them in one tensor" in str(caught.value)


@pytest.mark.nightly
def test_stock_vllm_does_not_start(made):
    stock_base = {**FLAG, "additional_config": {"int4_lora": {"backend": "stock-base"}}}
    for settings in ({}, {"enable_lora": True}, stock_base):
        with pytest.raises(Exception) as caught, engine(made()[0], **settings):  # noqa: PT011
            pass
        assert "No WNA16 MoE backend supports the deployment configuration" in str(caught.value)
