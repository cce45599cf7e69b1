"""vLLM's features together with the flag: answers stay the same, or the start is refused."""

import shutil

import pytest
import torch

from support.engines import (
    COLD,
    COMPILED,
    engine,
    generated,
    logprobs,
    requests_of,
    run_in_process,
)

SETTINGS = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16, **COLD}
CLOSE = 0.1  # nats: sums of bfloat16 in another order


def answers(llm, prompts, tiny_adapters):
    """Return log-probabilities of the base and of three adapters, each in a row of its own."""
    return torch.tensor(logprobs(llm, prompts, [None, *requests_of(tiny_adapters).values()]))


@pytest.fixture(scope="module")
def repeating(prompts):
    """Return prompts that repeat themselves, so that ``ngram`` has something to guess."""
    return [prompt[:6] * 4 for prompt in prompts]


@pytest.fixture(scope="module")
def plain(tiny_models, tiny_adapters, prompts, repeating):
    """Return the answers of an engine without features."""
    with engine(tiny_models["g128"], **SETTINGS) as llm:
        requests = [None, *requests_of(tiny_adapters).values()]
        return answers(llm, prompts, tiny_adapters), generated(llm, repeating, requests)


@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(
            {"enable_chunked_prefill": True, "max_num_batched_tokens": 16}, id="chunked-prefill"
        ),
        pytest.param({"enable_prefix_caching": True, "block_size": 32}, id="prefix-caching"),
    ],
)
def test_the_answers_are_the_same(feature, plain, tiny_models, tiny_adapters, prompts):
    with engine(tiny_models["g128"], **SETTINGS, **feature) as llm:
        first = answers(llm, prompts, tiny_adapters)
        again = answers(llm, prompts, tiny_adapters)  # from what the first has left in caches
    assert (first - plain[0]).abs().max() <= CLOSE
    assert (again - plain[0]).abs().max() <= CLOSE


DRAFT = {"method": "draft_model", "num_speculative_tokens": 3, "quantization": "int4_lora"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("speculative", "models"),
    [
        pytest.param(NGRAM, 1, id="ngram"),
        pytest.param(DRAFT, 2, id="draft-model"),
    ],
)
def test_speculative_decoding(
    speculative, models, plain, tiny_models, tiny_adapters, repeating, tmp_path
):
    """In a process of its own: after it, numba does not let vLLM start another engine in one."""
    if models == 2:
        speculative = {**speculative, "model": str(tiny_models["g32"])}
    settings = {**SETTINGS, "speculative_config": speculative, "max_num_seqs": 8}
    guessed, output = run_in_process(
        tmp_path, tiny_models["g128"], tiny_adapters, repeating, settings, "generated"
    )
    assert guessed is not None, output
    assert output.count("8 of 8 linear layers fused") == models
    for (tokens, each), (others, others_each) in zip(plain[1], guessed, strict=True):
        for token, other, step, other_step in zip(tokens, others, each, others_each, strict=True):
            assert abs(step[token] - other_step[token]) <= CLOSE
            if token != other:
                assert abs(step[token] - step[other]) <= CLOSE  # two that are as likely
                break


def test_an_adapter_is_loaded_again_in_its_place(tiny_models, tiny_adapters, prompts, tmp_path):
    from vllm.lora.request import LoRARequest

    folder = shutil.copytree(tiny_adapters["b"], tmp_path / "one")
    with engine(tiny_models["g128"], **SETTINGS) as llm:
        both = [LoRARequest(name, 2, str(tiny_adapters[name])) for name in "b"]
        right = torch.tensor(logprobs(llm, prompts[:1], both))
        first = LoRARequest("one", 7, str(folder))
        assert torch.equal(torch.tensor(logprobs(llm, prompts[:1], [first])), right)
        shutil.rmtree(folder)
        shutil.copytree(tiny_adapters["a"], folder)
        again = LoRARequest("one", 7, str(folder), load_inplace=True)
        other = torch.tensor(logprobs(llm, prompts[:1], [LoRARequest("a", 9, str(folder))]))
        assert torch.equal(torch.tensor(logprobs(llm, prompts[:1], [again])), other)
        assert (other - right).abs().max() > CLOSE


def test_sleep_mode_is_refused(tiny_models):
    with (
        pytest.raises(Exception, match="Sleep"),  # by vLLM on a CPU, by the backend elsewhere
        engine(tiny_models["g128"], enable_sleep_mode=True, **COMPILED),
    ):
        pass


@pytest.fixture(scope="module")
def eager(tiny_models, prompts, tmp_path_factory):
    """Return the answers without vLLM's own compile."""
    answers, output = run_in_process(
        tmp_path_factory.mktemp("eager"), tiny_models["asym-g128"], {}, prompts, COLD
    )
    assert answers is not None, output
    return torch.tensor(answers)


@pytest.mark.parametrize(
    "in_graph", ["custom-op", pytest.param("inlined", marks=pytest.mark.nightly)]
)
def test_within_the_graph_of_vllm(in_graph, eager, tiny_models, prompts, tmp_path):
    """Without adapters vLLM compiles the model on a CPU, and the layers are part of its graph."""
    options = {"backend": "compiled", "in_graph": in_graph}
    settings = {
        "quantization": "int4_lora",
        "additional_config": {"int4_lora": options},
        "enforce_eager": False,
    }
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}  # so that it does compile
    compiled, output = run_in_process(
        tmp_path, tiny_models["asym-g128"], {}, prompts, settings, **env
    )
    assert compiled is not None, output
    assert (torch.tensor(compiled) - eager).abs().max() <= CLOSE
    assert "saved AOT compiled function" in output, output
