"""Weights whose columns are in the order of activations, which vLLM refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.activation_order import order_of_inputs, ordered
from support.engines import COLD, engine, logprobs, requests_of
from support.served_truth import truth_and_allowed


@pytest.mark.versions
@pytest.mark.parametrize(
    ("variant", "actorder"),
    [("asym-g128", "group"), pytest.param("g128", "dynamic", marks=pytest.mark.nightly)],
)
def test_they_are_served_right(variant, actorder, tiny_models, tiny_adapters, prompts, tmp_path):
    """Modules that are merged have the inputs, and so the order, in common."""
    model = ordered(tiny_models[variant], tmp_path / "model", actorder)
    folders = list(tiny_adapters.values())
    truth, allowed = truth_and_allowed(model, folders, prompts)
    without, _ = truth_and_allowed(tiny_models[variant], [], prompts)
    assert (truth[0] - without[0]).abs().amax() > 5 * allowed  # the order matters
    requests, rows = [None, *requests_of(tiny_adapters).values()], [0, 1, 2, 3]
    with engine(model, enable_lora=True, max_loras=3, max_lora_rank=16, **COLD) as llm:
        answers = logprobs(llm, prompts, [requests[row] for row in rows])
    right = torch.stack([truth[row, number] for number, row in enumerate(rows)])
    assert (torch.tensor(answers, dtype=torch.float64) - right).abs().amax() <= allowed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "the modules that vLLM merges into model.layers.0.mlp.gate_up_proj have different"),
        ({"backend": "stock-base"}, "its shape or its activation order: leave out the option"),
    ],
)
def test_refused(options, sentence, tiny_models, tmp_path):
    def order_of(name):
        return order_of_inputs(name) if options else len(name) + ord(name[0])

    model = ordered(tiny_models["g128"], tmp_path / "model", "group", order_of)
    settings = {**COLD, "additional_config": {"int4_lora": {"warm_up": False, **options}}}
    with pytest.raises(Exception) as caught, engine(model, **settings):  # noqa: PT011
        pass
    assert sentence in str(caught.value)


def test_a_module_without_an_order_is_not_merged_with_one_that_has_it(tiny_models, tmp_path):
    model = ordered(tiny_models["g128"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight_g_idx"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(Exception) as caught, engine(model, **COLD):  # noqa: PT011
        pass
    said = "2 of the 3 modules that vLLM merges into model.layers.1.self_attn.qkv_proj have a"
    assert said in str(caught.value)
