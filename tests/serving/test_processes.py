"""Engines in processes of their own: the multiprocess default, two ranks, and what is refused."""

import pytest
from serving.conftest import COMPILED, run

LORA = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16}


def furthest(one, other):
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def in_one_process(tiny_models, tiny_adapters, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    settings = {**LORA, **COMPILED}
    found, said = run(folder, tiny_models["asym-g128"], tiny_adapters, prompts, settings)
    assert found is not None, said
    assert "8 of 8 linear layers fused" in said
    return found


def test_an_engine_process_gives_the_same_answers(
    in_one_process, tiny_models, tiny_adapters, prompts, tmp_path
):
    settings, own = {**LORA, **COMPILED}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found, said = run(tmp_path, tiny_models["asym-g128"], tiny_adapters, prompts, settings, **own)
    assert found is not None, said
    assert furthest(found, in_one_process) <= 0.05


def test_two_ranks_give_the_answers_of_one(
    in_one_process, tiny_models, tiny_adapters, prompts, tmp_path
):
    settings, own = (
        {**LORA, **COMPILED, "tensor_parallel_size": 2},
        {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    found, said = run(tmp_path, tiny_models["asym-g128"], tiny_adapters, prompts, settings, **own)
    assert found is not None, said
    assert "8 of 8 linear layers fused" in said
    assert furthest(found, in_one_process) <= 0.1  # sums of halves, rounded in another order
