"""Settings, checkpoints and adapters that are refused: each stops the start with one sentence."""

import contextlib
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import edit_config, edit_tensors
from support.engines import COLD, CONFIG, FLAG, engine, logprobs, next_logprobs, requests_of

LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16}


def contradict(config, quantization):
    config["lora_compatible"], quantization["lora_compatible"] = True, False


@pytest.fixture
def model(tiny_models, tmp_path):
    return shutil.copytree(tiny_models["g128"], tmp_path / "copied")


def refused(model, **given):
    """Return what a start that does not succeed says."""
    with pytest.raises(Exception) as caught, engine(model, **given):  # noqa: PT011
        pass
    return str(caught.value)


@pytest.fixture
def log():
    """Return the lines that the plug-in logs during a test."""
    lines = []

    def keep(record):
        lines.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.int4_lora")
    logger.addFilter(keep)  # vLLM removes handlers when it starts an engine
    yield lines
    logger.removeFilter(keep)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"backand": "auto"}, "did you mean 'backend'"),
        ({"favour": "speed"}, "must be 'balanced' or 'decode' or 'prefill', got 'speed'"),
        ({"backend": "quick"}, "must be 'auto' or 'compiled' or 'stock-base', got 'quick'"),
        ({"cache_bytes": "1"}, "cache_bytes must be int, got str"),
    ],
)
def test_a_wrong_option(given, sentence, model):
    config = {"int4_lora": given}
    assert sentence in refused(model, **FLAG, additional_config=config)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda _, q: q.update(transform_config={"config_groups": {}}),
            "quantise without them, or leave out --quantization int4_lora",
        ),
        (lambda config, _: config.update(lora_compatible=3), "must be true or false, got 3"),
        (contradict, "make them the same"),
    ],
)
def test_a_checkpoint_that_is_not_taken(change, sentence, model):
    edit_config(model, change)
    assert sentence in refused(model, **FLAG)


def settings(**changes):
    """Return what the plug-in reads of vLLM's configuration: of a CPU that compiles the model."""
    read = {
        "fully_sharded_loras": False,
        "enable_sleep_mode": False,
        "pipeline_parallel_size": 1,
        "device_type": "cpu",
        "mode": 2,
        **changes,
    }
    part = SimpleNamespace(**read)
    names = ("model", "parallel", "lora", "device", "compilation")
    return SimpleNamespace(**{f"{name}_config": part for name in names})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"VLLM_LORA_ENABLE_DUAL_STREAM": "0"}, None),
        ({"VLLM_LORA_ENABLE_DUAL_STREAM": "1"}, "unset VLLM_LORA_ENABLE_DUAL_STREAM"),
        ({"VLLM_BATCH_INVARIANT": "1"}, "take VLLM_BATCH_INVARIANT, .* unset the variable"),
        ({"VLLM_BATCH_INVARIANT": "0"}, None),
        ({"fully_sharded_loras": True}, "leave out --fully-sharded-loras"),
        ({"enable_sleep_mode": True}, "leave out --enable-sleep-mode"),
    ],
)
def test_settings_that_are_refused(change, sentence, monkeypatch):
    from int4_lora.integration.vllm_plugin.served_engine import refuse_settings

    for name in [name for name in change if name.startswith("VLLM")]:
        monkeypatch.setenv(name, change[name])
    with pytest.raises(ValueError, match=sentence) if sentence else contextlib.nullcontext():
        refuse_settings(settings(**change))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),  # vLLM compiles the model
        ({"device_type": "cuda", "mode": 0}, None),
        ({"mode": 0}, "with --enable-lora: leave out --enable-lora, or --pipeline"),
        ({"mode": 0, "lora": False}, "with --enforce-eager: leave out --enforce-eager, or --pipe"),
    ],
)
def test_pipeline_stages_on_a_cpu(change, sentence):
    from int4_lora.integration.vllm_plugin.served_engine import refuse_settings

    lora = change.pop("lora", True)
    for stages in (1, 2):
        given = settings(pipeline_parallel_size=stages, **change)
        if not lora:
            given.lora_config = None
        stops = sentence is not None and stages == 2
        with pytest.raises(ValueError, match=sentence) if stops else contextlib.nullcontext():
            refuse_settings(given)


@pytest.mark.parametrize(
    ("rank", "most", "refused"),
    [
        (12, 16, False),
        (24, 32, False),
        (48, 64, False),
        (300, 320, False),
        (24, 16, True),
        (640, 512, True),
    ],
)
def test_ranks_that_vllm_takes(rank, most, refused):
    """VLLM's list is for the slots; adapters may have any rank up to theirs."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    adapter = PEFTHelper(r=rank, lora_alpha=8, target_modules=["q_proj"])
    sentence = f"rank {rank} is greater than max_lora_rank"
    with pytest.raises(ValueError, match=sentence) if refused else contextlib.nullcontext():
        adapter.validate_legal(LoRAConfig(max_lora_rank=most))
    with pytest.raises(ValueError, match="max_lora_rank"):
        LoRAConfig(max_lora_rank=rank)


@pytest.mark.parametrize(("option", "sentence"), [("use_dora", "DoRA"), ("lora_bias", "LoRA bias")])
def test_adapters_that_are_not_plain_lora(option, sentence):
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], option: True}
    with pytest.raises(ValueError, match=sentence):
        PEFTHelper.from_dict(config).validate_legal(LoRAConfig())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "on a GPU"),
        ({"options": {"backend": "stock-base"}}, "as the option backend asks"),
        ({"ignore": ["re:.*experts.*"]}, "no INT4 weights"),
    ],
)
def test_experts_that_are_left_to_vllm_are_counted(change, reason, monkeypatch):
    from vllm.model_executor.layers import fused_moe

    from int4_lora.integration.vllm_plugin import config
    from int4_lora.integration.vllm_plugin.options import Options

    class RoutedExperts(fused_moe.RoutedExperts):  # schemes are found by the name
        ckpt_gate_proj_name, ckpt_up_proj_name = "gate_proj", "up_proj"
        ckpt_down_proj_name = "down_proj"

        def __init__(self):
            torch.nn.Module.__init__(self)

    given = {**CONFIG, "ignore": change.get("ignore", ["lm_head"])}
    upstream = config.CompressedTensorsConfig
    monkeypatch.setattr(upstream, "get_quant_method", lambda *_: "vLLM's")
    ours = config.Int4LoRAConfig.from_config(given)
    options = Options(**change.get("options", {}))
    ours._engine = config.ServedEngine(options=options, device=change.get("device", "cpu"))
    assert ours.get_quant_method(RoutedExperts(), "model.experts") == "vLLM's"
    assert [experts.fallback_reason for experts in ours._engine.experts] == [reason]


def experts_config(**changes):
    """Return what the plug-in reads of vLLM's configuration of a layer of experts."""
    parallel = {"use_ep": False, "dp_size": 1, "pcp_size": 1}
    parallel |= {name: changes.pop(name) for name in list(changes) if name in parallel}
    activation = SimpleNamespace(value=changes.pop("activation", "silu"))
    return SimpleNamespace(
        moe_parallel_config=SimpleNamespace(**parallel), activation=activation, **changes
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"activation": "gelu_tanh", "has_bias": False, "swiglu_limit": None}, None),
        ({"use_ep": True}, "leave out --enable-expert-parallel"),
        ({"dp_size": 2}, "leave out --data-parallel-size and run several servers"),
        ({"activation": "swigluoai"}, "must be one of silu, gelu_tanh, got swigluoai"),
        ({"has_bias": True}, "experts with has_bias are not taken, as of model.experts"),
        ({"swiglu_limit": 7.0}, "experts with swiglu_limit are not taken"),
    ],
)
def test_experts_that_are_refused(change, sentence):
    from int4_lora.integration.vllm_plugin.experts_method import refuse_experts

    with pytest.raises(ValueError, match=sentence) if sentence else contextlib.nullcontext():
        refuse_experts("model.experts", experts_config(**change))


def test_pairs_that_experts_share_are_refused():
    from int4_lora.integration.vllm_plugin.experts_lora import EXPERTS_LAYERS

    for kind in EXPERTS_LAYERS:
        with pytest.raises(ValueError, match="leave out --enable-moe-shared-loras"):
            kind.__new__(kind).create_lora_weights(
                1, SimpleNamespace(enable_moe_shared_loras=True), None
            )


def test_experts_in_the_order_of_activations_are_refused():
    from int4_lora.integration.vllm_plugin.experts_method import refuse_experts

    with pytest.raises(ValueError, match="quantise with actorder static"):
        refuse_experts("model.experts", experts_config(), ordered=True)


def test_an_adapter_that_vllm_does_not_take(model, prompts, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from int4_lora.integration.demo import recipe
    from support.tiny import LLAMA

    sampling = SamplingParams(max_tokens=1, detokenize=False)
    with engine(model, **LORA, **COLD) as llm:
        for number, (variant, sentence) in enumerate(
            [
                ({"use_dora": True}, "does not yet support DoRA"),
                ({"lora_bias": True}, "lora_bias|lora_B.bias"),
                ({"r": 24}, "greater than max_lora_rank"),
            ]
        ):
            given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **variant}
            folder = tmp_path / f"bad{number}"
            recipe.make_adapter(folder, LLAMA, "bad", given)
            bad = LoRARequest(folder.name, number + 1, str(folder))
            with pytest.raises(Exception, match=sentence):
                llm.generate([{"prompt_token_ids": prompts[0]}], sampling, lora_request=[bad])


def test_an_old_minor(model, monkeypatch):
    from int4_lora.integration.vllm_plugin import contract

    monkeypatch.setattr(contract, "installed_version", lambda: "0.29.0")
    assert "vLLM 0.29.0 is older than 0.30: install a newer version" in refused(model, **FLAG)


def test_a_model_that_is_not_quantised(model):
    def dense(config, _):
        del config["quantization_config"]

    edit_config(model, dense)
    sentence = "this model has no quantization_config: leave out --quantization int4_lora"
    assert sentence in refused(model, **FLAG)


def test_another_format(model):
    edit_config(model, lambda _, q: q.update(quant_method="fp8"))
    sentence = "AWQ and GPTQ checkpoints, and this one is 'fp8': leave out --quantization"
    assert sentence in refused(model, **FLAG)


def test_weights_are_reloaded(model, prompts, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    edit_tensors(other, weight_scale=lambda scale: 2 * scale)
    with engine(other, **COLD) as llm:
        right = logprobs(llm, prompts[:1], [None])
    with engine(model, **COLD) as llm:
        before = logprobs(llm, prompts[:1], [None])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert logprobs(llm, prompts[:1], [None]) == right != before


def with_prefix(folder, copy, old, new):
    """Copy an adapter and change the prefix of its modules; return the copy."""
    shutil.copytree(folder, copy)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(renamed, copy / "adapter_model.safetensors")
    return copy


def test_modules_that_are_not_named_or_match_no_layer(model, tiny_adapters, tmp_path, log):
    """Outside ``lora_target_modules``; with another prefix; of a layer that is not there."""
    (model / "lora_metadata.json").write_text(
        json.dumps({"lora_compatible": True, "lora_target_modules": ["q_proj", "o_proj"]})
    )
    good = tiny_adapters["a"]
    prefix = with_prefix(good, tmp_path / "prefix", "model.layers", "model.text.layers")
    deep = with_prefix(good, tmp_path / "deep", "layers.1.", "layers.9.")
    with engine(model, **LORA, **COLD) as llm:
        requests = requests_of({"good": good, "prefix": prefix, "deep": deep})
        tokens = [list(range(3, 12))]
        ask = lambda request: next_logprobs(llm, tokens, [request])[0]  # noqa: E731
        base, answers = ask(None), {name: ask(request) for name, request in requests.items()}
        ask(requests["prefix"])
    outside = [line for line in log if "lora_target_modules" in line]
    assert len(outside) == 1
    assert "targets v_proj" in outside[0]
    assert "q_proj, o_proj" in outside[0]
    of_none, of_some = [line for line in log if "int4_lora: adapter" in line]
    first = "model.text.layers.0.self_attn.q_proj"
    assert of_none == (
        f"int4_lora: adapter prefix ({prefix}): none of its 4 modules match a layer, so that the "
        f"base model serves it; the first is {first}; all would match if names that start with "
        "'model.text.' started with 'model.'"
    )
    assert of_some == (
        f"int4_lora: adapter deep ({deep}): 2 of its 4 modules match no layer and are left out; "
        "the first is model.layers.9.self_attn.q_proj"
    )
    assert answers["prefix"] == base
    assert base != answers["deep"] != answers["good"] != base


def test_a_model_that_says_so_without_the_flag(model, log):
    edit_config(model, lambda config, _: config.update(lora_compatible=True))
    with engine(model):
        pass
    assert sum("the model says lora_compatible" in line for line in log) == 1
