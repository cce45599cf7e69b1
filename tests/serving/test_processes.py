"""Engines in processes of their own: the multiprocess default, two ranks, two stages."""

import pytest
import torch

from support.engines import COLD, run_in_process
from support.served_truth import truth_and_allowed

SETTINGS = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16, **COLD}


def furthest(answers, others):
    pairs = zip(answers, others, strict=True)
    return max(abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def short(prompts):
    return [prompt[:9] for prompt in prompts]


@pytest.fixture(scope="module")
def in_one_process(tiny_models, tiny_adapters, short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    answers, output = run_in_process(
        folder, tiny_models["asym-g128"], tiny_adapters, short, SETTINGS
    )
    assert answers is not None, output
    assert "8 of 8 linear layers fused" in output
    return answers


@pytest.mark.nightly
def test_an_engine_process_gives_the_same_answers(
    in_one_process, tiny_models, tiny_adapters, short, tmp_path
):
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    answers, output = run_in_process(
        tmp_path, tiny_models["asym-g128"], tiny_adapters, short, SETTINGS, **env
    )
    assert answers is not None, output
    assert furthest(answers, in_one_process) <= 0.05


def test_two_ranks_give_the_answers_of_one(
    in_one_process, tiny_models, tiny_adapters, short, tmp_path
):
    settings = {**SETTINGS, "tensor_parallel_size": 2}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    answers, output = run_in_process(
        tmp_path, tiny_models["asym-g128"], tiny_adapters, short, settings, **env
    )
    assert answers is not None, output
    assert "8 of 8 linear layers fused" in output
    assert furthest(answers, in_one_process) <= 0.1  # sums of halves, rounded in another order


@pytest.mark.nightly
def test_two_stages_give_right_answers(tiny_models, short, tmp_path):
    """Without LoRA, within vLLM's own compile: a CPU has them there alone."""
    model = tiny_models["asym-g128"]
    truth, allowed = truth_and_allowed(model, [], short)
    settings = {**COLD, "enforce_eager": False, "pipeline_parallel_size": 2}
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),  # so that both stages do compile
    }
    answers, output = run_in_process(tmp_path, model, {}, short, settings, **env)
    assert answers is not None, output
    assert output.count("4 of 4 linear layers fused") == 2
    assert (torch.tensor(answers, dtype=torch.float64) - truth[0]).abs().amax() <= allowed
