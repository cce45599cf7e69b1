"""The results of unpack and merge, served by stock vLLM and by ours, beside their source."""

import torch

from int4_lora.integration.conversion import merge_checkpoint, unpack_checkpoint
from support.engines import COLD, engine, logprobs
from support.served_truth import truth_and_allowed


def served(model, prompts, **settings):
    with engine(model, **settings) as llm:
        return torch.tensor(logprobs(llm, prompts, [None] * len(prompts)), dtype=torch.float64)


def test_unpacked_and_merged_models_give_the_answers(tiny_models, tiny_adapters, prompts, tmp_path):
    model, adapter = tiny_models["asym-g32"], next(iter(tiny_adapters.values()))
    truth, allowed = truth_and_allowed(model, [adapter], prompts)
    assert (truth[1] - truth[0]).abs().amax() > 5 * allowed
    unpack_checkpoint(model, tmp_path / "dense")
    merge_checkpoint(model, tmp_path / "merged", [(adapter, 1.0)])
    assert (served(model, prompts, **COLD) - truth[0]).abs().amax() <= allowed
    assert (served(tmp_path / "dense", prompts) - truth[0]).abs().amax() <= allowed
    assert (served(tmp_path / "merged", prompts) - truth[1]).abs().amax() <= allowed


def test_a_merged_int4_model_is_served_as_it_is_dequantised(
    tiny_models, tiny_adapters, prompts, tmp_path
):
    adapter = next(iter(tiny_adapters.values()))
    target = tmp_path / "merged"
    merge_checkpoint(tiny_models["g128"], target, [(adapter, 1.0)], to="int4")
    truth, allowed = truth_and_allowed(target, [], prompts)
    assert (served(target, prompts, **COLD) - truth[0]).abs().amax() <= allowed
