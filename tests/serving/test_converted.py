"""What unpack and merge wrote, served by stock vLLM and ours, beside the model it was made of."""

import pytest
import torch
from serving.conftest import COMPILED, engine, logprobs
from serving.test_answers import FLOOR, peft_logprobs

from int4_lora.integration.conversion import merge_checkpoint, unpack_checkpoint


def served(model, prompts, **settings):
    with engine(model, **settings) as llm:
        return torch.tensor(logprobs(llm, prompts, [None] * len(prompts)), dtype=torch.float64)


@pytest.mark.parametrize("variant", ["asym-g32"])
def test_unpacked_and_merged_models_give_the_answers(
    variant, tiny_models, tiny_adapters, prompts, tmp_path
):
    model, adapter = tiny_models[variant], next(iter(tiny_adapters.values()))
    truth = peft_logprobs(model, [adapter], prompts, torch.float64)
    theirs = peft_logprobs(model, [adapter], prompts, torch.bfloat16)
    allowed = 2 * (theirs - truth).abs().amax() + FLOOR
    assert (truth[1] - truth[0]).abs().amax() > 5 * allowed
    unpack_checkpoint(model, tmp_path / "dense")
    merge_checkpoint(model, tmp_path / "merged", [(adapter, 1.0)])
    packed = served(model, prompts, **COMPILED)
    dense = served(tmp_path / "dense", prompts)
    assert (packed - truth[0]).abs().amax() <= allowed
    assert (dense - truth[0]).abs().amax() <= allowed
    assert (served(tmp_path / "merged", prompts) - truth[1]).abs().amax() <= allowed


def test_a_merged_int4_model_is_served_as_it_is_dequantised(
    tiny_models, tiny_adapters, prompts, tmp_path
):
    adapter = next(iter(tiny_adapters.values()))
    target = tmp_path / "merged"
    merge_checkpoint(tiny_models["g128"], target, [(adapter, 1.0)], to="int4")
    truth = peft_logprobs(target, [adapter], prompts, torch.float64)[0]
    theirs = peft_logprobs(target, [adapter], prompts, torch.bfloat16)[0]
    allowed = 2 * (theirs - truth).abs().amax() + FLOOR
    assert (served(target, prompts, **COMPILED) - truth).abs().amax() <= allowed
