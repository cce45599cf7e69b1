"""Shapes that vLLM's kernels refuse: in_features and out_features that 32 does not divide."""

import pytest
import torch

from support.engines import COMPILED, engine, logprobs, requests_of
from support.served_truth import truth_and_allowed
from support.tiny import LLAMA, make_tiny

ODD = {**LLAMA, "hidden_size": 72, "head_dim": 32, "intermediate_size": 100}


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("odd") / "model", "channel", ODD)


@pytest.fixture(scope="module")
def odd_adapter(tmp_path_factory):
    from int4_lora.integration.demo import recipe

    folder = tmp_path_factory.mktemp("odd") / "adapter"
    settings = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}
    recipe.make_adapter(folder, ODD, "odd", settings)
    return folder


@pytest.mark.versions
@pytest.mark.parametrize("backend", ["auto", pytest.param("compiled", marks=pytest.mark.nightly)])
def test_they_are_served_right(backend, odd_model, odd_adapter, prompts):
    truth, allowed = truth_and_allowed(odd_model, [odd_adapter], prompts)
    assert (truth[1] - truth[0]).abs().amax() > 5 * allowed
    settings = {**COMPILED, "additional_config": {"int4_lora": {"backend": backend}}}
    rows = [0, 1, 1, 0]
    with engine(odd_model, enable_lora=True, max_loras=2, max_lora_rank=8, **settings) as llm:
        requests = [None, *requests_of({"odd": odd_adapter}).values()]
        answers = logprobs(llm, prompts, [requests[row] for row in rows])
    right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
    assert (torch.tensor(answers, dtype=torch.float64) - right).abs().amax() <= allowed


@pytest.mark.parametrize("flag", [True, False])
def test_stock_refuses_them_with_the_flag_in_the_process_or_without(flag, odd_model):
    settings = {}
    if flag:
        options = {"backend": "stock-base"}
        settings = {"quantization": "int4_lora", "additional_config": {"int4_lora": options}}
    with pytest.raises(Exception) as caught, engine(odd_model, **settings):  # noqa: PT011
        pass
    sentence = (
        "no kernel for its bits, its shape or its activation order: leave out the option backend"
    )
    assert (sentence if flag else "Failed to find a kernel") in str(caught.value)
